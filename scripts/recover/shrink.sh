#!/usr/bin/env bash
# Leaves half of the experts and of their neurons, in two stages with distillation behind each (SlimMoE, arXiv 2506.18349); trailing words override.
exec bash "$(dirname "$0")/../run.sh" compress "shrink experts=0.5 width=0.5 stages=2 steps=60" model="${MODEL:-tiny-mixtral}" "$@"
