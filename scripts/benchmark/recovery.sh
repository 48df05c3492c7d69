#!/usr/bin/env bash
# Steps towards a cached teacher beside one that runs, the memory of losses and of layerwise training, and what router_kd holds.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/recovery_speed.py" "$@"
