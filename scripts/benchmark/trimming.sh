#!/usr/bin/env bash
# Speed of the trimming searches as ratios to plain implementations, all measured in this one run.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/trimming_speed.py" "$@"
