#!/usr/bin/env bash
# Drops half of the experts, then trains one layer after the other to give what the original's gives; trailing words override.
exec bash "$(dirname "$0")/../run.sh" compress "expert_drop ratio=0.5 + layerwise steps=40" model="${MODEL:-tiny-mixtral}" "$@"
