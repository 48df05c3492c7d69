#!/usr/bin/env bash
# Lint, types and tests in the project's own environment; arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set -e
cd "$repository"
"$python" -m ruff check src tests
"$python" -m ruff format --check src tests
"$python" -m mypy
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal "$@"
