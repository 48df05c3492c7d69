#!/usr/bin/env bash
# The checks that need a GPU: the same tests on CUDA, bf16, full-size layers one at a time; one line where there is none.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/gpu_checks.py" "$@"
