#!/usr/bin/env bash
# Prunes DeepSeek's routed experts and spares the shared ones, which costs less in arXiv 2406.02500; trailing words override.
exec bash "$(dirname "$0")/../../run.sh" compress "prune method=sparsegpt pattern=2:4 where=experts,shared spare=shared" model="${MODEL:-tiny-deepseek}" "$@"
