#!/usr/bin/env bash
# Rebuilds results/records and the tables made from them: every trimming method at about 25 % and 50 % on the zoo's models.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export OMP_NUM_THREADS=1
exec "$python" "$repository/scripts/benchmark/zoo_grid.py" "$@"
