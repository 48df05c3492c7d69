#!/usr/bin/env bash
# Speed and memory of quantization as ratios to plain implementations and to dense experts, all measured in this one run.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/quantization_speed.py" "$@"
