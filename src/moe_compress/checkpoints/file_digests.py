"""SHA-256 of files, each read once: what was read stays known by the file's size and times.

Files in the hub's cache are named by theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_compress.utils.files import gigabytes, read_json, write_json
from moe_compress.utils.logging import log

Stamp = tuple[int, int]
THREADS = 4


def stamp(path: Path) -> Stamp:
    """Size and time of the last change in ns."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    cache = _cache()
    known = read_json(cache) if cache.is_file() else {}
    keys = {path: _key(path) for path in paths}
    found = {path: _blob(path) or known.get(key, "") for path, key in keys.items()}
    unknown = [path for path, digest in found.items() if not digest]
    if unknown:
        total = gigabytes(sum(path.stat().st_size for path in unknown))
        log.info("reading %s once, to know the model again.", total)
        with ThreadPoolExecutor(THREADS) as pool:
            found |= dict(zip(unknown, pool.map(_digest, unknown), strict=True))
        with contextlib.suppress(OSError):  # a cache that cannot be written to is none
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {**known, **{keys[path]: found[path] for path in unknown}})
    return {path.name: digest for path, digest in found.items()}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-compress" / "digests.json"


def _key(path: Path) -> str:
    """A file as it is now: whatever writes to it changes one of these."""
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _blob(path: Path) -> str:
    """The name of a large file in the hub's cache; empty for any other."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name) else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
