"""One run at a time: the place where a checkpoint is being made belongs to one process, and is cleared of old work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_compress.checkpoints.folder import (
    begun_identity,
    clear_partial,
    partial_folder,
    read_manifest,
    remove_intermediate,
)
from moe_compress.utils.files import NoSpaceError


@contextlib.contextmanager
def exclusive_output(out: Path, identities: Sequence[str]) -> Iterator[None]:
    """Let this run alone write `out` and the folders beside it; what other recipes left unfinished there goes.

    identities: those of the checkpoints that this run writes, which it takes up where they are. A ValueError would
    come again, so nothing is kept of such a run; killed or interrupted, it can go on. Raises ValueError where another
    run is writing.
    """
    with _locked(partial_folder(out)):
        _clear(out, identities)
        try:
            yield
        except ValueError as error:
            if not isinstance(error, NoSpaceError):
                _clear(out, ())
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock of the system's on a folder, which it gives up when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        try:
            yield
        finally:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    with contextlib.suppress(OSError):  # of file systems without locks
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            free = False
        if not free:
            raise ValueError(f"another run is writing {folder}: wait until it has ended, or choose another out=.")


def _clear(out: Path, identities: Sequence[str]) -> None:
    """Remove unfinished work and stages of ours beside `out`, but for those that `identities` stand for."""
    ours = re.compile(re.escape(out.name) + r"(\.stage\d+(\.partial)?|\.partial)")
    for folder in [path for path in out.parent.iterdir() if path.is_dir() and ours.fullmatch(path.name)]:
        unfinished = folder.name.endswith(".partial")
        found = begun_identity(folder) if unfinished else (read_manifest(folder) or {}).get("identity")
        if found is None or found in identities:
            continue
        if not unfinished:
            remove_intermediate(folder)
            continue
        clear_partial(folder)
        if folder != partial_folder(out):  # which is locked, and goes with its lock
            folder.rmdir()
