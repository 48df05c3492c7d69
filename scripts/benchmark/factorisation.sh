#!/usr/bin/env bash
# Errors and processor time of shared cores beside gradient descent, Gram matrices beside a forward pass, and decoding in factors.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/factorisation_speed.py" "$@"
