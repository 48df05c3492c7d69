#!/usr/bin/env bash
# Loads a checkpoint in a fresh stock process, compares logits, generates: MODEL=runs/checkpoints/... bash verify.sh
exec bash "$(dirname "$0")/../run.sh" verify "${MODEL:-tiny-mixtral}" "$@"
