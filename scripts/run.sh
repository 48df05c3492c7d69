#!/usr/bin/env bash
# moe-compress in its own environment, made on first use: bash scripts/run.sh compress expert_drop keep=6
# NPROC=4: by so many processes, which train together (docs/training.md).
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "${NPROC:-1}" -gt 1 ]; then
    export PYTHONSAFEPATH=1
    exec "$python" -P -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m moe_compress "$@"
fi
# -P: a file of the caller's folder that is called like a module stays out of the way.
exec "$python" -P -m moe_compress "$@"
