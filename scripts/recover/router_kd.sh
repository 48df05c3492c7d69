#!/usr/bin/env bash
# Drops half of the experts, then trains the routers alone to say what the original says (arXiv 2603.02217); trailing words override.
exec bash "$(dirname "$0")/../run.sh" compress "expert_drop ratio=0.5 + router_kd steps=60" model="${MODEL:-tiny-mixtral}" "$@"
