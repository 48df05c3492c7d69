#!/usr/bin/env bash
# Shares out 2.5 bits a weight among the matrices of all experts, GPTQ at each; trailing words override: budget=3 by=gradient per=expert ...
case "${MODEL:=tiny-mixtral}" in tiny-*) group=32 ;; *) group=128 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "quantize method=gptq bits=auto budget=2.5 group_size=$group" model="$MODEL" samples=128 "$@"
