#!/usr/bin/env bash
# Quantizes DeepSeek's experts to 4 bits, then removes MoE blocks (4 on the real model as in arXiv 2406.02500, 1 on the tiny one); trailing words override.
case "${MODEL:=tiny-deepseek}" in tiny-*) group=32 drop=1 ;; *) group=128 drop=4 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "quantize group_size=$group + layer_drop drop=$drop" model="$MODEL" "$@"
