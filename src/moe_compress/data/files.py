"""Files of text as bytes: which are read, plain or compressed, and what is refused before a byte of it is."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow

from moe_compress.utils.files import HEAD, require_utf8, room_for

# What the ending of a name says of the content, in any case; and of the compression around it.
KINDS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READ = f"{', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]} are read, each also as {' and '.join(COMPRESSIONS)}"
BLOCK = 1 << 20
IN_MEMORY = 1 << 26  # bytes of a decompressed or converted file, before it goes to the disk
# A compressed file of more than IN_MEMORY that grows by more than this is no text: real text shrinks to a fifth.
MAX_GROWTH = 500


def kind_of(path: Path) -> tuple[str, str] | None:
    """Content and compression ("" for none) by the ending of the name; None if it is none that is read."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    kind = KINDS.get((path.with_suffix("") if compression else path).suffix.lower())
    return (kind, compression) if kind else None


def local_file(source: str) -> Path | None:
    """The file that a source names; None if it names none, and so is a data set (or a folder that holds one).

    Raises ValueError for a file that is missing, that is no file, or of a kind that is not read.
    """
    path = Path(source)
    known = kind_of(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        if known or path.is_absolute() or source.startswith((".", "~")):
            raise ValueError(f"there is no file {path}.") from None
        return None
    if stat.S_ISDIR(mode) and not known:
        return None
    if path.resolve().is_relative_to("/proc"):
        raise ValueError(f"{path} is a file of the system's own, which may never end: a regular file is needed.")
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket, which may never end"
        raise ValueError(f"{path} is {what}: a regular file is needed.")
    if known is None:
        raise ValueError(f"{path} is a file, but of no kind that is read by its name: {READ}.")
    return path


def opened(path: Path) -> IO[bytes]:
    """The content of a file, decompressed, as a seekable stream."""
    known = kind_of(path)
    file = path.open("rb") if known is None or not known[1] else _unpacked(path, known[1])
    if known is not None and known[0] != "parquet":
        require_utf8(path, file.read(HEAD))
        file.seek(0)
    return file


def _unpacked(path: Path, compression: str) -> IO[bytes]:
    content = spooled()
    size = path.stat().st_size
    try:
        for block in _decompressed(path, compression):
            with room_for(Path(tempfile.gettempdir())):
                content.write(block)
            if content.tell() > max(IN_MEMORY, MAX_GROWTH * size):
                raise ValueError(f"{path} grows to more than {MAX_GROWTH} times its size when it is decompressed.")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as {compression}: {error}.") from error
    content.seek(0)
    return content


def spooled() -> IO[bytes]:
    """A nameless stream in memory, or on the disk once it has grown."""
    return tempfile.SpooledTemporaryFile(IN_MEMORY)


def _decompressed(path: Path, compression: str) -> Iterator[bytes]:
    open_stream: Any = (
        gzip.open if compression == "gzip" else lambda place: pyarrow.CompressedInputStream(str(place), compression)
    )
    with open_stream(path) as stream:
        while block := stream.read(BLOCK):
            yield block


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
