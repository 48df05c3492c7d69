"""Whether a training lives, and how it ended: a file among its checkpoints that its process touches every few seconds.

out.steps/training.json      what the last process that wrote it says; killed, that says nothing more
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from moe_compress.checkpoints.steps import steps_folder
from moe_compress.utils.files import NoSpaceError, read_json, write_json

SIGN = "training.json"
BEAT_SECONDS = 5.0
# `stopped`: by what may be otherwise when the same command is run again.
State = Literal["runs", "finished", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class LifeSign:
    """What a training's process said of itself.

    run: the identity of the training; reason: why it failed or stopped; process, host, started: of the process.
    """

    run: str
    state: State
    reason: str = ""
    process: int
    host: str
    started: str


def sign_file(out: Path) -> Path:
    """Where the sign of a training that leaves `out` is."""
    return steps_folder(out) / SIGN


def read_sign(out: Path) -> tuple[LifeSign, int] | None:
    """The sign, and when it was last touched (nanoseconds); None where there is none, or nothing that is one."""
    path = sign_file(out)
    try:
        return LifeSign(**read_json(path)), path.stat().st_mtime_ns
    except (ValueError, TypeError, FileNotFoundError):
        return None


@contextlib.contextmanager
def living(trainings: Mapping[Path, str]) -> Iterator[None]:
    """Show that these trainings (by what they leave, their identities) live while what is inside runs, and how it ends.

    A sign that would be alone in its folder then goes, unless what is inside was interrupted, and may go on.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    here = LifeSign(run="", state="runs", process=os.getpid(), host=socket.gethostname(), started=started)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(list(trainings), over), daemon=True)
    _say(trainings, here)
    beat.start()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        state: State = "stopped" if isinstance(error, NoSpaceError) else "failed"
        with contextlib.suppress(ValueError, OSError):  # the disk may be what failed
            _end(trainings, replace(here, state=state, reason=reason))
        raise
    else:
        _end(trainings, replace(here, state="finished"))
    finally:
        over.set()
        beat.join()


def _say(trainings: Mapping[Path, str], sign: LifeSign) -> None:
    for out, run in trainings.items():
        write_json(sign_file(out), asdict(replace(sign, run=run)))


def _end(trainings: Mapping[Path, str], sign: LifeSign) -> None:
    _say(trainings, sign)
    for folder in map(steps_folder, trainings):
        if [path.name for path in folder.iterdir()] == [SIGN]:
            shutil.rmtree(folder)


def _beat(outs: list[Path], over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        for out in outs:
            with contextlib.suppress(OSError):  # removed by somebody, or a disk that is away for a while
                os.utime(sign_file(out))
