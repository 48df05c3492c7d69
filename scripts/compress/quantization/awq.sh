#!/usr/bin/env bash
# Quantizes the experts to 4 bits by AWQ, groups of 128 inputs (of 32 in the tiny models); trailing words override: bits=3 where=all ...
case "${MODEL:=tiny-mixtral}" in tiny-*) group=32 ;; *) group=128 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "quantize method=awq bits=4 group_size=$group" model="$MODEL" samples=128 "$@"
