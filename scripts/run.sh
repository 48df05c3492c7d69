#!/usr/bin/env bash
# moe-compress in its own environment, made on first use: bash scripts/run.sh compress expert_drop keep=6
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m moe_compress "$@"
