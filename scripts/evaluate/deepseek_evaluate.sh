#!/usr/bin/env bash
# Perplexity of a DeepSeek checkpoint, paired with its original's: MODEL=runs/checkpoints/... bash deepseek_evaluate.sh
exec bash "$(dirname "$0")/../run.sh" evaluate "${MODEL:-tiny-deepseek}" "$@"
