"""A process that evaluates checkpoints, one after the other: what it takes down, it takes down with itself alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from moe_compress.evaluation.pair import open_pair
from moe_compress.evaluation.quality.evaluate import evaluate_pair
from moe_compress.evaluation.tasks.report import task_report
from moe_compress.evaluation.watching.evaluated import with_tasks
from moe_compress.utils.devices import threads

LAST_SECONDS = 5.0
START = "from moe_compress.evaluation.watching.process import main; main()"
Found = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A checkpoint to be evaluated as `evaluate` and `tasks` do, or the original that it is compared with.

    place: where its record and its report of tasks are kept.
    """

    folder: Path
    of_original: bool
    original: str | None
    options: dict[str, Any]
    tasks: str
    limit: int | None
    place: Path


def evaluate_job(job: Job) -> Found:
    """Metrics by name, and the name of the record."""
    opened, base, run = open_pair(job.folder, job.original, dict(job.options), "watch")
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if job.of_original:
        opened = base
    with threads(run.options.threads):
        record, _ = evaluate_pair(opened, base, run)
        record.save(job.place / "records")
        asked = None
        if job.tasks:
            report = task_report(opened, base, run, job.tasks, limit=job.limit)
            report.save(job.place / "tasks")
            asked = report.to_json()
    metrics = {name: metric.model_dump(mode="json") for name, metric in record.metrics.items()}
    return {"metrics": with_tasks(metrics, asked, "before" if job.of_original else "after"), "record": record.name}


class Evaluator:
    """The other end: starts the process when it is needed, and anew where it has ended."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def __call__(self, job: Job) -> Found:
        """Evaluate. ValueError with a sentence for whatever came in between, the end of the process as well."""
        if self.process is None or self.process.poll() is not None:
            self._launch()
        try:
            self.connection.send(job)
            good, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            code = self._end()
            raise ValueError(
                f"the process that evaluates ended early (exit code {code}): it may have run out of memory."
            ) from error
        if not good:
            raise ValueError(answer)
        return dict(answer)

    def _launch(self) -> None:
        self._end()
        self.connection, theirs = Pipe()
        # As many threads as it may use, said before a library starts them.
        own = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def _end(self) -> int | None:
        """End the process, if there is one; what it ended with."""
        if self.process is None:
            return None
        self.connection.close()  # at which it ends by itself, if it listens
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_SECONDS)
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return code


def main() -> None:
    """What the process runs, for which its end of the pipe is the number of an open file."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the other end is gone
        while True:
            job = connection.recv()
            answer: tuple[bool, Any]
            try:
                answer = True, evaluate_job(job)
            except Exception as error:  # whatever a checkpoint, a task or a device may raise is that checkpoint's row
                answer = False, " ".join(str(error).split()) or type(error).__name__
            connection.send(answer)
