#!/usr/bin/env bash
# Speed and memory of the engine as ratios, all measured in this one run.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/engine_speed.py" "$@"
