"""A program for tests of trainings by several processes: it forks as many, which share its imports, for every command.

argv: a JSON list of [words, point, environment], and how many processes. The second one is killed at the step of the
optimiser that `point` names, counted from 0; none where it is -1. `launch` runs the program, or torchrun in its place.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Job = tuple[Sequence[str], int, Mapping[str, str]]


def launch(jobs: Sequence[Job], *starter: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run commands by so many processes of this machine. starter: a module that starts them, and its arguments."""
    import moe_compress

    place = os.pathsep.join([str(Path(moe_compress.__file__).parents[1]), str(Path(__file__).parents[1])])
    start = ["-m", *starter] if starter else []
    return subprocess.run(
        [sys.executable, *start, __file__, json.dumps(jobs), str(count)],
        env={**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _doomed(point: int) -> None:
    """Kill this process, if it is the second, at a step."""
    from moe_compress.compression.recovery.trained_weights import Optimiser

    real = Optimiser.step

    def counted(self: Any, number: int) -> None:
        if number == point and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, number)

    Optimiser.step = counted  # type: ignore[method-assign]


def _command(words: Sequence[str], point: int, environment: Mapping[str, str]) -> int:
    """Run one in this process; its exit code."""
    from moe_compress.cli import commands

    os.environ.update(environment)
    if point >= 0:
        _doomed(point)
    sys.argv = ["moe-compress", *words]
    try:
        commands.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _forked(rank: int, count: int, port: int, job: Job) -> int:
    """A process of a launch; its id."""
    child = os.fork()
    if child == 0:
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in launch.items()}})
        code = _command(*job)
        sys.stdout.flush()
        os._exit(code)
    return child


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> int:
    jobs, count = json.loads(sys.argv[1]), int(sys.argv[2])
    if "RANK" in os.environ:
        return max([_command(*job) for job in jobs])
    import moe_compress.api  # noqa: F401

    ended = []
    for job in jobs:
        port = _free_port()
        children = [_forked(rank, count, port, job) for rank in range(count)]
        ended += [os.waitpid(child, 0)[1] for child in children]
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(main())
