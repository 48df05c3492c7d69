#!/usr/bin/env bash
# Perplexity of a Mixtral checkpoint, paired with its original's: MODEL=runs/checkpoints/... bash mixtral_evaluate.sh
exec bash "$(dirname "$0")/../run.sh" evaluate "${MODEL:-tiny-mixtral}" "$@"
