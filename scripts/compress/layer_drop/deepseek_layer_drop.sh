#!/usr/bin/env bash
# Removes the MoE blocks that hardly turn the stream: 4 of DeepSeek's as in arXiv 2406.02500, 1 of the tiny model's; trailing words override.
case "${MODEL:=tiny-deepseek}" in tiny-*) drop=1 ;; *) drop=4 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "layer_drop drop=$drop" model="$MODEL" "$@"
