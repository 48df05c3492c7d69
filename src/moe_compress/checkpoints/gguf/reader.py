"""GGUF files as byte ranges: metadata and tensors where they lie, nothing decoded.

A file is a magic word, counts, metadata, the tensors' names, shapes, types and offsets, then aligned data. The gguf
package's own reader makes objects of every token of a vocabulary (8 s and 700 MB for Qwen's) and believes every length
that a broken file claims; here both stay bytes, and every length is held against the file's.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.checkpoints.gguf.library import gguf_library
from moe_compress.checkpoints.gguf.metadata import ARRAY, NUMBERS, STRING, MetadataEntry
from moe_compress.utils.files import require_regular

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# More texts than any vocabulary has: reading on would take minutes.
MAX_TEXTS = 1 << 24
SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor where it lies: bytes [start, stop) of a file. shape: as numpy has it, the slowest axis first."""

    file: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file: metadata by key, tensors in their order."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, MetadataEntry]
    tensors: list[GgufTensor]


@dataclass(frozen=True)
class GgufModel:
    """A model in one GGUF file or in several that it was split into; the first one has the metadata."""

    shards: list[GgufFile]

    @property
    def path(self) -> Path:
        """The first file."""
        return self.shards[0].path

    @property
    def metadata(self) -> Mapping[str, MetadataEntry]:
        """Of the first file."""
        return self.shards[0].metadata

    @property
    def architecture(self) -> str:
        """What llama.cpp calls it."""
        return str(self.metadata["general.architecture"].value)

    @functools.cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        """Of all files, by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    def key(self, name: str) -> str:
        """A key of this architecture."""
        return f"{self.architecture}.{name}"

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of this architecture's metadata. ValueError where it is missing, unless there is a default."""
        entry = self.metadata.get(self.key(name))
        value = default if entry is None else entry.value
        if not isinstance(value, int):
            raise ValueError(f"{self.path}: its metadata has no number {self.key(name)}.")
        return value


def open_gguf(path: Path) -> GgufModel:
    """A model, from its only file or any of those it was split into. ValueError names what is broken or missing."""
    first = read_gguf(path)
    entry = first.metadata.get("split.count")
    if entry is None or entry.value in (0, 1):
        return _checked([first])
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != entry.value:
        raise ValueError(f"{path} is one of {entry.value} files: its name has to end as in -00001-of-00003.gguf.")
    shards = []
    for number in range(entry.value):
        shard = path.with_name(f"{match[1]}-{number + 1:05d}-of-{entry.value:05d}.gguf")
        if not shard.is_file():
            raise ValueError(f"{path} is one of {entry.value} files, and {shard.name} is not beside it.")
        shards.append(first if shard == path else read_gguf(shard))
        found = {
            key: shards[-1].metadata[key].value for key in ("split.no", "split.count") if key in shards[-1].metadata
        }
        if found != {"split.no": number, "split.count": entry.value}:
            raise ValueError(f"{shard} is not part {number + 1} of {entry.value}, as its name says.")
    return _checked(shards)


def _checked(shards: list[GgufFile]) -> GgufModel:
    model = GgufModel(shards)
    architecture = model.metadata.get("general.architecture")
    kind = model.metadata.get("general.type")
    if architecture is None or not isinstance(architecture.value, str) or (kind and kind.value != "model"):
        raise ValueError(f"{model.path} holds no model: its metadata has no general.architecture.")
    if len(model.tensors) != sum(len(shard.tensors) for shard in shards):
        raise ValueError(f"{model.path}: two of its tensors have one name.")
    return model


def read_gguf(path: Path) -> GgufFile:
    """The metadata of one file and where its tensors lie. ValueError names a file that is none, or broken."""
    require_regular(path)
    with path.open("rb") as handle:
        if path.stat().st_size < 24 or handle.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file.")
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            try:
                return _Parser(path, memory).file()
            except (struct.error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} has a broken header, or ends within it: fetch it again.") from error


class _Parser:
    """Reads one file from the front; struct.error where it ends too early."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory, self.at = path, memory, 4
        self.version = self.number("I")
        if self.version not in VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big") in VERSIONS
            why = "is big-endian" if swapped else f"is of GGUF version {self.version}"
            raise ValueError(f"{path} {why}: versions 2 and 3 are read, little-endian; convert the model anew.")

    def file(self) -> GgufFile:
        """All of the header."""
        tensor_count, entry_count = self.number("Q"), self.number("Q")
        metadata: dict[str, MetadataEntry] = {}
        for _ in range(entry_count):
            entry = self.entry()
            if entry.key in metadata:
                raise ValueError(f"{self.path}: its metadata has {entry.key} twice.")
            metadata[entry.key] = entry
        alignment = metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment={alignment} is no power of two.")
        described = [self.tensor() for _ in range(tensor_count)]
        base = -(-self.at // alignment) * alignment
        tensors = [self.placed(base, *each) for each in described]
        return GgufFile(self.path, self.version, alignment, metadata, tensors)

    def number(self, form: str) -> Any:
        """One number."""
        (found,) = struct.unpack_from(f"<{form}", self.memory, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def skip(self, count: int) -> None:
        """Step over bytes."""
        if count > len(self.memory) - self.at:
            raise struct.error(f"{count} bytes are not there")
        self.at += count

    def text(self) -> str:
        """A text behind its length."""
        length = self.number("Q")
        self.skip(length)
        return self.memory[self.at - length : self.at].decode()

    def entry(self) -> MetadataEntry:
        """One key with its value."""
        begin = self.at
        key, kind, count = self.text(), self.number("I"), None
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
        start = self.at
        if kind == STRING:
            if (count or 0) > MAX_TEXTS:
                raise ValueError(f"{self.path}: {key} claims {count} texts, more than any vocabulary has.")
            for _ in range(1 if count is None else count):
                self.skip(self.number("Q"))
        elif kind in NUMBERS:
            self.skip((1 if count is None else count) * struct.calcsize(f"<{NUMBERS[kind]}"))
        else:
            raise ValueError(f"{self.path}: {key} is of type {kind}, which no reader of GGUF knows.")
        return MetadataEntry(key, kind, count, self.memory[begin : self.at], start - begin)

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape and offset of one tensor."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: {name} has {dimensions} axes; tensors have at most {MAX_DIMENSIONS}.")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, self.number("I"), shape, self.number("Q")

    def placed(self, base: int, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
        """The tensor's bytes in the file."""
        library = gguf_library()
        known = next((size for each, size in library.GGML_QUANT_SIZES.items() if each == kind), None)
        if known is None:
            raise ValueError(f"{self.path}: {name} is of type {kind}, which the installed gguf package does not know.")
        block, size = known
        if shape and shape[-1] % block:
            raise ValueError(f"{self.path}: the rows of {name}, {shape[-1]} numbers, are no whole blocks of {block}.")
        start = base + offset
        stop = start + math.prod(shape) // block * size
        if stop > len(self.memory):
            raise ValueError(f"{self.path} ends within {name}: it is truncated; fetch it again.")
        return GgufTensor(self.path, name, kind, shape, start, stop)
