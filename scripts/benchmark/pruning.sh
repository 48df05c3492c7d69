#!/usr/bin/env bash
# Speed and memory of pruning as ratios to plain implementations, all measured in this one run.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/pruning_speed.py" "$@"
