#!/usr/bin/env bash
# Processor time of help, lists, tables and errors as ratios to importing what a command line is made of; planning beside one skeleton.
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/startup_time.py" "$@"
