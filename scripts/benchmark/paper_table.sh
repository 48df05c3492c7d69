#!/usr/bin/env bash
# Trimming x slimming, Table 3 of arXiv 2406.02500, resumable: MODEL="/models/Mixtral-8x7B-v0.1 ..." bash paper_table.sh [out=DIR] [samples=64 ...] [snakemake's options]
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$python" "$repository/scripts/benchmark/paper_table.py" "$@"
