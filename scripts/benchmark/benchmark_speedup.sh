#!/usr/bin/env bash
# Prefill and decoding of a model beside itself with half of its blocks (DROP= another number): MODEL=... bash benchmark_speedup.sh prompts=128,1024 batches=1,8
case "${MODEL:=tiny-mixtral}" in tiny-*) drop=2 quick="quick=true" ;; *) drop=16 quick="" ;; esac
run=$(dirname "${BASH_SOURCE[0]}")/../run.sh half=runs/checkpoints/$(basename "$MODEL")-half
bash "$run" compress "block_drop drop=${DROP:-$drop}" model="$MODEL" eval=false out="$half" && exec bash "$run" speed "$half" $quick "$@"
