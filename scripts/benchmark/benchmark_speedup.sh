#!/usr/bin/env bash
# Prefill and decoding of a model beside itself with half of its blocks (DROP= another number): MODEL=... bash benchmark_speedup.sh prompts=128,1024 batches=1,8
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
case "${MODEL:=tiny-mixtral}" in tiny-*) quick="quick=true" ;; *) quick="" ;; esac
half=$("$python" -P -c 'import sys; from moe_compress.checkpoints.resolve import layers_of; n = layers_of(sys.argv[1]); print(n // 2, "of", n)' "$MODEL") || exit 2
drop=${DROP:-${half%% *}} out=runs/checkpoints/$(basename "$MODEL")-without-
echo "$MODEL without $drop blocks; half are $half." >&2
"$python" -P -m moe_compress compress "block_drop drop=$drop" model="$MODEL" eval=false out="$out$drop" &&
    exec "$python" -P -m moe_compress speed "$out$drop" $quick "$@"
