"""What every part needs and none should invent: devices, dtypes, fingerprints, atomic files, logs.

Nothing here knows about models. Importing it has no effect.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import difflib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

log = logging.getLogger("moe_compress")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NoSpaceError(ValueError):
    """A disk is too small: the same run may well succeed later, so nothing that it has done is thrown away."""


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU or the CPU; anything else must exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name} is not a device: use auto, cpu or cuda[:N].") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not supported: use auto, cpu or cuda[:N].")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name} was asked for, but torch sees no GPU: use device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name} was asked for, but torch sees only {torch.cuda.device_count()} GPUs.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` computes in fp32 on a CPU (bf16 is slower there) and in bf16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[one_of(name, DTYPES, "dtype")]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def one_of(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is known, else a ValueError that suggests the nearest one."""
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}known: {', '.join(names)}.")


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that identify `parts` (JSON values or bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bytes of a tensor, [n]; a view where it lies on the CPU in one piece."""
    dense = tensor.detach().cpu().contiguous()
    # A tensor of one element is contiguous whatever its stride, which then stands in the way of a view.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor, for hashing."""
    return flat_bytes(tensor).numpy().tobytes()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    atomic_write(path, as_json(value).encode())


def as_json(value: Any) -> str:
    """JSON that a person can read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; a broken one is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


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


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that could still be used on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the highest memory use so far, where the system lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class RunLog:
    """One JSONL file a run: a line per event, with seconds since the start; a run that does nothing leaves none."""

    def __init__(self, path: Path | None, **options: Any) -> None:
        self.path = path
        self.options = options
        self.started = time.perf_counter()

    def event(self, name: str, **fields: Any) -> None:
        """Append one line; also say it at debug level."""
        line = {"event": name, "seconds": round(time.perf_counter() - self.started, 3), **fields}
        log.debug("%s", line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            first = [] if self.path.exists() else [{"event": "started", "seconds": 0.0, **self.options}]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each) + "\n" for each in [*first, line])


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


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def return_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@functools.cache
def _libc() -> Any:
    name = ctypes.util.find_library("c")
    return ctypes.CDLL(name) if name else None
