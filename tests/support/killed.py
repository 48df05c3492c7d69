"""A program for tests of resuming: runs a recipe in children that are killed, and then once more to the end.

argv: a JSON list of [point, number, sentence, options]. Point `layer` kills after that many calls of a layer, `write`
in the middle of a tensor after that many, `step` after that many of an optimiser, `time` after that many milliseconds.
For each, a line goes to standard output: the signal that ended the first child, and how many layers the second one ran.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import moe_compress
from moe_compress.checkpoints import safetensors_file
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.engine import forward

Job = tuple[str, int, str, dict[str, Any]]


def in_child(work: Callable[[Job], None], job: Job) -> int:
    """Do the work in a forked process, which shares the imports; returns its id."""
    child = os.fork()
    if child == 0:
        work(job)
        os._exit(0)
    return child


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(job: Job) -> None:
    """A run that dies at its point."""
    point, number, sentence, options = job
    seen = [0]
    run_layer, write_all, step = forward.hf.run_layer, safetensors_file.write_all, Optimiser.step

    def counted_layer(*args: Any) -> torch.Tensor:
        seen[0] += 1
        return run_layer(*args) if seen[0] <= number else die()

    def counted_write(out: int, data: memoryview) -> None:
        seen[0] += 1
        if seen[0] > number:
            os.write(out, data[: len(data) // 2])
            die()
        write_all(out, data)

    def counted_step(self: Any, at: int) -> None:
        seen[0] += 1
        if seen[0] > number:
            die()
        step(self, at)

    if point == "layer":
        forward.hf.run_layer = counted_layer
    elif point == "write":
        safetensors_file.write_all = counted_write
    elif point == "step":
        Optimiser.step = counted_step
    moe_compress.compress(sentence, **options)


def whole(job: Job) -> None:
    """The same run, to its end; says how many layers it ran."""
    _, _, sentence, options = job
    seen = [0]
    run_layer = forward.hf.run_layer

    def counted_layer(*args: Any) -> torch.Tensor:
        seen[0] += 1
        return run_layer(*args)

    forward.hf.run_layer = counted_layer
    moe_compress.compress(sentence, **options)
    print(seen[0], flush=True)


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        child = in_child(doomed, job)
        if job[0] == "time":
            time.sleep(job[1] / 1000)
            os.kill(child, signal.SIGKILL)
        killed = os.WTERMSIG(os.waitpid(child, 0)[1])
        print(killed, end=" ", flush=True)
        os.waitpid(in_child(whole, job), 0)


if __name__ == "__main__":
    main()
