#!/usr/bin/env bash
# Accuracy on tasks beside the original's: MODEL=runs/checkpoints/... bash tasks.sh [tasks=local|paper|NAMES]
exec bash "$(dirname "$0")/../run.sh" tasks "${MODEL:-tiny-mixtral}" "$@"
