#!/usr/bin/env bash
# How far a checkpoint routes otherwise than its original, layer by layer: MODEL=runs/checkpoints/... bash routing.sh
exec bash "$(dirname "$0")/../run.sh" routing "${MODEL:-tiny-mixtral}" "$@"
