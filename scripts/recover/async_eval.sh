#!/usr/bin/env bash
# Trains, and evaluates the checkpoints beside it as they appear; trailing words are the training's: OUT=folder bash async_eval.sh [steps=...]
# A GPU each: WATCH="device=cuda:1" bash async_eval.sh device=cuda:0
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
out=${OUT:-runs/checkpoints/recovered}
# shellcheck disable=SC2086  # words are to be split
"$python" -P -m moe_compress watch "$out" best=kl poll=2 eval_samples=64 threads=1 ${WATCH:-} &
watch=$!
trap 'kill "$watch" 2>/dev/null' EXIT
"$python" -P -m moe_compress compress "expert_drop ratio=0.5 + distill steps=60 checkpoint_every=15 keep_checkpoints=1" \
    model="${MODEL:-tiny-mixtral}" out="$out" eval=false threads=1 "$@"
status=$?
# A training that failed is evaluated as far as it came; of one that never began nothing is there to be waited for.
[ "$status" = 0 ] || [ -f "$out.steps/training.json" ] || exit "$status"
wait "$watch" || status=$?
exit "$status"
