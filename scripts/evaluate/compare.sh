#!/usr/bin/env bash
# Generations of two models side by side, and how close their predictions are: MODEL=A WITH=B bash compare.sh [prompts=FILE]
exec bash "$(dirname "$0")/../run.sh" compare "${MODEL:-tiny-mixtral}" "${WITH:-tiny-mixtral-seed1}" "$@"
