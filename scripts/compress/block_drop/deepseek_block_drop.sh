#!/usr/bin/env bash
# Removes the layers that hardly turn the stream: 4 of DeepSeek's as in arXiv 2406.02500, 1 of the tiny model's; mode=consecutive: one run of them.
case "${MODEL:=tiny-deepseek}" in tiny-*) drop=1 ;; *) drop=4 ;; esac
exec bash "$(dirname "$0")/../../run.sh" compress "block_drop drop=$drop" model="$MODEL" "$@"
