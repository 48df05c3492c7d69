#!/usr/bin/env bash
# One core for DeepSeek's experts and a low rank for each: as many numbers as wrappers of rank 64 (rank 128), half of a tiny model's experts; trailing words override.
case "${MODEL:=tiny-deepseek}" in tiny-*) size=ratio=0.5 ;; *) size=rank=128 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "factorise structure=base_delta $size" model="$MODEL" "$@"
