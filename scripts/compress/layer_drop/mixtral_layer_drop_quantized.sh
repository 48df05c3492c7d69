#!/usr/bin/env bash
# Quantizes Mixtral's experts to 4 bits, then removes MoE blocks (8 on the real model as in arXiv 2406.02500, 1 on the tiny one); trailing words override.
case "${MODEL:=tiny-mixtral}" in tiny-*) group=32 drop=1 ;; *) group=128 drop=8 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "quantize group_size=$group + layer_drop drop=$drop" model="$MODEL" "$@"
