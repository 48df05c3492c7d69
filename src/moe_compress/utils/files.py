"""Files: written whole or not at all, read with one clear sentence where that fails; disk space and locks."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_compress.utils.logging import log

CHUNK_BYTES = 1 << 30


class NoSpaceError(ValueError):
    """A disk is too small: the same run may well succeed later, so nothing that it has done is thrown away."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    atomic_write(path, as_json(value).encode())


def as_json(value: Any) -> str:
    """JSON that a person can read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place once all is written, and goes where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with room_for(path):
            yield temporary
            temporary.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


# What the system says of a file that it takes no more of.
NO_ROOM = {
    errno.ENOSPC: "its disk is full: free some space, or choose another folder",
    errno.EDQUOT: "your quota of its disk is used up: free some space, or choose another folder",
    errno.EFBIG: "it is larger than files may be here: raise that limit (ulimit -f), or choose another file system",
}


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """NoSpaceError, with its name, where a file cannot be written to its end."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise NoSpaceError(f"{path} could not be written whole, for {NO_ROOM[error.errno]}.") from error


def write_all(out: int, data: memoryview) -> None:
    """Write all of it to a file descriptor."""
    while data:
        data = data[os.write(out, data[:CHUNK_BYTES]) :]


def copy_range(source: int, start: int, stop: int, out: int, name: Path) -> None:
    """Copy bytes [start, stop) of the file `name` inside the kernel, or through memory where that is not possible."""
    while start < stop:
        wanted = min(CHUNK_BYTES, stop - start)
        try:
            copied = os.copy_file_range(source, out, wanted, start)
        except OSError:
            copied = os.sendfile(out, source, start, wanted)
        if copied == 0:
            raise ValueError(f"{name} ended while it was being copied.")
        start += copied


# Of what is read whole. The largest index of a published model takes a tenth of it.
MOST_JSON, MOST_TEXT = 256 << 20, 4 << 20


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a file; ValueError for one that is no regular file, larger than `most` bytes, or not UTF-8."""
    try:
        size = path.stat().st_size
        require_regular(path)
        if size > most:
            raise ValueError(f"{path} has {gigabytes(size)}, and at most {gigabytes(most)} are read.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}.") from error
    except UnicodeDecodeError as error:
        require_utf8(path, bytes(error.object[:HEAD]))
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def require_regular(path: Path) -> None:
    """Raise ValueError unless there is such a file, and it is one that has an end."""
    if not path.exists():
        raise ValueError(f"there is no file {path}.")
    if not path.is_file():
        raise ValueError(f"{path} is no file that can be read: it is a folder, a pipe, a device or a socket.")


# Bytes that tell how a text is encoded, and the marks that begin one.
HEAD = 64
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def require_utf8(path: Path, head: bytes) -> None:
    """Raise ValueError for a text that begins as one in another Unicode encoding does: by a mark, or every other 0."""
    found = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    halves = head[: len(head) // 2 * 2][::2], head[1::2]
    if not found and any(half and not any(half) for half in halves) and any(map(any, halves)):
        found = "UTF-16"
    if found:
        raise ValueError(f"{path} is {found} text: save it as UTF-8, which is what is read.")


def read_json(path: Path) -> Any:
    """Read a JSON file; a broken one is named."""
    text = read_text(path, MOST_JSON)
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON (it nests too deeply).") from error
    except ValueError as error:  # also of numbers with more digits than Python reads
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that is there twice, readers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def require_disk(folder: Path, needed_bytes: int, what: str, advice: str = "choose another folder with out=") -> None:
    """Refuse to start writing what cannot fit."""
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise NoSpaceError(
            f"{what} needs {gigabytes(needed_bytes)}, but {existing} has {gigabytes(free)} free: "
            f"free some space or {advice}."
        )


def require_writable(folder: Path, what: str) -> None:
    """Refuse a place where nothing can be written: below a file, on a read-only disk, under an impossible name."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".moe-compress-", dir=_existing(folder)))
    except OSError as error:
        raise ValueError(
            f"{what}: nothing can be written to {folder} ({error.strerror}); choose another folder."
        ) from error


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(p for p in [folder, *folder.absolute().parents] if p.exists())


def gigabytes(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


@contextlib.contextmanager
def one_at_a_time(lock: Path, what: str) -> Iterator[None]:
    """Wait until no other process is in here with the same lock, a file of no content that stays."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another run is %s: waiting for it.", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            log.debug("%s is on a file system without locks.", lock)
        yield
