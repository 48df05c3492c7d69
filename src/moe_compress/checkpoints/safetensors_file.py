"""Safetensors files as byte ranges, so that untouched tensors are copied by the kernel and never decoded.

A file is an 8-byte length, a JSON header (name -> dtype, shape, byte range), then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.utils.files import copy_range, replacing, write_all
from moe_compress.utils.hashing import flat_bytes

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# The format's own limit of its header.
MOST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class FileRegion:
    """A tensor where it lies: bytes [start, stop) of a safetensors file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Stored size."""
        return self.stop - self.start


def read_regions(file: Path) -> dict[str, FileRegion]:
    """Every tensor of a safetensors file; ValueError names a truncated or broken one."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            raise ValueError(f"{file} is truncated or not a safetensors file: fetch it again.")
        base = 8 + length
        try:
            header = json.loads(handle.read(length))
            regions = {key: _region(file, key, entry, base) for key, entry in header.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has a broken safetensors header: fetch it again.") from error
    end = max((region.stop for region in regions.values()), default=base)
    if end != size:
        raise ValueError(f"{file} is {size} bytes long where its header says {end}: it is truncated; fetch it again.")
    _require_seamless(file, regions, base)
    return regions


def _require_seamless(file: Path, regions: Mapping[str, FileRegion], base: int) -> None:
    """ValueError unless tensors lie one behind the other, as the format has it: no byte is shared, or nobody's."""
    for region in sorted(regions.values(), key=lambda region: (region.start, region.stop)):
        if region.start != base:
            raise ValueError(f"{file} has a broken safetensors header: {region.key} does not begin where others end.")
        base = region.stop


def _region(file: Path, key: str, entry: dict[str, Any], base: int) -> FileRegion:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)) or stop < start:
        raise ValueError(f"{key} has the shape {shape} at {start} to {stop}")
    if entry["dtype"] in STORED_DTYPES and stop - start != math.prod(shape) * STORED_DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{key} has {stop - start} bytes for the shape {shape}")
    return FileRegion(file, key, entry["dtype"], shape, base + start, base + stop)


def write_shard(
    file: Path,
    tensors: Mapping[str, Tensor] | Mapping[str, Tensor | FileRegion],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file: tensors from memory, regions straight from their files.

    Written under a temporary name and renamed, so that a file under its real name is always whole.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for key, tensor in tensors.items():
        dtype, shape, size = _describe(tensor)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as temporary, temporary.open("wb", buffering=0) as out:
        write_all(out.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            if isinstance(tensor, FileRegion):
                _copy(tensor, out.fileno())
            else:
                write_all(out.fileno(), flat_bytes(tensor).numpy().data)


def _describe(tensor: Tensor | FileRegion) -> tuple[str, tuple[int, ...], int]:
    if isinstance(tensor, FileRegion):
        return tensor.dtype, tensor.shape, tensor.bytes
    return NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size()


def _copy(region: FileRegion, out: int) -> None:
    with region.file.open("rb", buffering=0) as source:
        copy_range(source.fileno(), region.start, region.stop, out, region.file)
