#!/usr/bin/env bash
# moe-compress in its own environment, made on first use: bash scripts/run.sh compress expert_drop keep=6
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# -P: a file of the caller's folder that is called like a module stays out of the way.
exec "$python" -P -m moe_compress "$@"
