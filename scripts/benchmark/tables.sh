#!/usr/bin/env bash
# Rebuilds results/records and the tables made from them: every score x {25 %, 50 %} on the zoo's models.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export OMP_NUM_THREADS=1
exec "$python" scripts/benchmark/tables.py "$@"
