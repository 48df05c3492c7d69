"""Devices, dtypes, threads and memory."""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from moe_compress.utils.choices import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@contextlib.contextmanager
def measured_cost(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds and peak memory of a block, in what it yields, once the block is done."""
    cost: dict[str, float] = {}
    reset_peak_memory(device)
    started = time.perf_counter()
    yield cost
    cost |= {"seconds": time.perf_counter() - started, "peak_bytes": peak_memory_bytes(device)}


def reset_peak_memory(device: torch.device) -> None:
    """Forget the highest memory use so far, where the system lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


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
