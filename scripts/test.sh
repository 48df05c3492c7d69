#!/usr/bin/env bash
# Lint, types and tests in the project's own environment; --all runs the slow tests as well, other arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set -e
cd "$repository"
unset PYTHONDONTWRITEBYTECODE  # dozens of processes are started: they share what is compiled
if [ "$1" = --all ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
"$python" -m ruff check src tests scripts
"$python" -m ruff format --check src tests scripts
"$python" -m mypy
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal "$@"
