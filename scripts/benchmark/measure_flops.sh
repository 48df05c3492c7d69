#!/usr/bin/env bash
# FLOPs and sizes by component, from a config alone: MODEL=mistralai/Mixtral-8x7B-v0.1 bash measure_flops.sh [check=true]
exec bash "$(dirname "$0")/../run.sh" flops "${MODEL:-tiny-mixtral}" "$@"
