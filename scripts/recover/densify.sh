#!/usr/bin/env bash
# Makes one MLP a layer of the four best experts, then trains the dense model to say what the original says (arXiv 2605.28207); trailing words override.
exec bash "$(dirname "$0")/../run.sh" compress "densify keep=4 score=reap + distill train=all steps=60" model="${MODEL:-tiny-mixtral}" "$@"
