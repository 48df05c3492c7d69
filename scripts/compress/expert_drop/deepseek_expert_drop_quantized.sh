#!/usr/bin/env bash
# Quantizes DeepSeek's experts to 4 bits, then drops a quarter of them as bytes; trailing words override: keep=6 bits=3 score=naee ...
case "${MODEL:=tiny-deepseek}" in tiny-*) group=32 ;; *) group=128 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "quantize group_size=$group + expert_drop score=reap budget=layer ratio=0.25" model="$MODEL" "$@"
