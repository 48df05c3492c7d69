#!/usr/bin/env bash
# Trains the four shipped models, one thread each, two at a time: bash scripts/zoo/train.sh [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export python OMP_NUM_THREADS=1 out=${1:-$repository/src/moe_compress/zoo/models}
printf '%s\n' 'mixtral 0' 'mixtral 1 -seed1' 'deepseek 0' 'deepseek 1 -seed1' | xargs -P 2 -L 1 bash -c \
    'exec "$python" "$repository/scripts/zoo/train.py" --model "tiny-$0" --seed "$1" --out "$out/tiny-$0${2:-}"'
