"""A smaller GGUF model out of a larger one: metadata patched, tensors sliced along experts, all else byte for byte."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compress.checkpoints.gguf.cut import BY_EXPERT, Cut, decoder_layers, split_name
from moe_compress.checkpoints.gguf.metadata import MetadataEntry, number_entry
from moe_compress.checkpoints.gguf.reader import GgufFile, GgufModel, GgufTensor
from moe_compress.utils.files import copy_range, room_for, write_all

# Arrays of an architecture that are never one number a layer.
NOT_BY_LAYER = ("rope.dimension_sections", "classifier.output_labels")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to be written: byte ranges of the source, one after the other."""

    source: GgufTensor
    name: str
    shape: tuple[int, ...]
    ranges: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Stored size."""
        return sum(stop - start for start, stop in self.ranges)


def pieces(shard: GgufFile, cut: Cut) -> list[Piece]:
    """What is left of a file's tensors, in their order."""
    place = {layer: number for number, layer in enumerate(cut.layers)}
    found = []
    for tensor in shard.tensors:
        layer, rest = split_name(tensor.name)
        if layer is None:
            found.append(Piece(tensor, tensor.name, tensor.shape, [(tensor.start, tensor.stop)]))
        elif layer in place:
            found.append(_piece(tensor, f"blk.{place[layer]}.{rest}", rest, cut.experts.get(layer)))
    return found


def _piece(tensor: GgufTensor, name: str, rest: str, experts: Sequence[int] | None) -> Piece:
    if experts is None or not BY_EXPERT.fullmatch(rest):
        return Piece(tensor, name, tensor.shape, [(tensor.start, tensor.stop)])
    each = (tensor.stop - tensor.start) // tensor.shape[0]
    ranges: list[tuple[int, int]] = []
    for expert in experts:
        start = tensor.start + expert * each
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, tensor.start + (expert + 1) * each))
    return Piece(tensor, name, (len(experts), *tensor.shape[1:]), ranges)


def patched(model: GgufModel, cut: Cut) -> dict[str, MetadataEntry | None]:
    """Metadata that is another after the cut; None: it goes."""
    numbers = {
        "expert_count": cut.count,
        "expert_used_count": cut.top_k,
        "block_count": len(cut.layers),
        "leading_dense_block_count": sum(n < model.number("leading_dense_block_count", 0) for n in cut.layers),
        "nextn_predict_layers": 0,
    }
    found: dict[str, MetadataEntry | None] = {"general.size_label": None}  # 8x7B is 8x7B no more
    for name, number in numbers.items():
        entry = model.metadata.get(model.key(name))
        if entry is not None:
            found[entry.key] = entry.with_value(number)
    return found | dict(_by_layer(model, cut)) | _expert_width(model, cut)


def _expert_width(model: GgufModel, cut: Cut) -> dict[str, MetadataEntry | None]:
    """The experts' width, where llama.cpp would divide the dense one by a number of active experts that changes."""
    key, dense = model.key("expert_feed_forward_length"), model.metadata.get(model.key("feed_forward_length"))
    width = model.tensors[f"blk.{next(iter(cut.experts))}.ffn_down_exps.weight"].shape[-1]
    divided = dense is not None and dense.count is None and dense.value != width
    if key in model.metadata or not divided or cut.top_k == model.number("expert_used_count"):
        return {}
    return {key: number_entry(key, width)}


def _by_layer(model: GgufModel, cut: Cut) -> Iterator[tuple[str, MetadataEntry]]:
    """Arrays of one number a layer, for the layers that are left."""
    count, decoder = model.number("block_count"), decoder_layers(model)
    if len(cut.layers) == count:
        return
    for key, entry in model.metadata.items():
        own = key.removeprefix(model.key(""))
        if own == key or own in NOT_BY_LAYER or entry.count not in (count, decoder) or entry.value is None:
            continue
        yield key, entry.with_value([entry.value[layer] for layer in cut.layers])


def write_cut(model: GgufModel, cut: Cut, targets: Mapping[Path, Path]) -> None:
    """Write what is left of every file (source -> target), one tensor after the other."""
    patches = patched(model, cut)
    left = {shard.path: pieces(shard, cut) for shard in model.shards}
    total = model.metadata.get("split.tensors.count")
    if total is not None:
        patches[total.key] = total.with_value(sum(map(len, left.values())))
    for number, shard in enumerate(model.shards):
        entries = [patches.get(key, entry) for key, entry in shard.metadata.items()]
        if number == 0:
            entries += [entry for key, entry in patches.items() if key not in shard.metadata]
        _write(targets[shard.path], shard, [entry for entry in entries if entry is not None], left[shard.path])


def cut_bytes(model: GgufModel, cut: Cut) -> int:
    """What the tensors that are left take."""
    return sum(piece.bytes for shard in model.shards for piece in pieces(shard, cut))


def _write(target: Path, shard: GgufFile, entries: Sequence[MetadataEntry], left: Sequence[Piece]) -> None:
    header = struct.pack("<4sIQQ", b"GGUF", shard.version, len(left), len(entries))
    header += b"".join(entry.raw for entry in entries)
    offset = 0
    for piece in left:
        name = piece.name.encode()
        axes = piece.shape[::-1]
        header += struct.pack(
            f"<Q{len(name)}sI{len(axes)}QIQ", len(name), name, len(axes), *axes, piece.source.kind, offset
        )
        offset += _aligned(piece.bytes, shard.alignment)
    with room_for(target), target.open("wb", buffering=0) as out, shard.path.open("rb", buffering=0) as source:
        padding = bytes(_aligned(len(header), shard.alignment) - len(header))
        write_all(out.fileno(), memoryview(header + padding))
        for piece in left:
            for start, stop in piece.ranges:
                copy_range(source.fileno(), start, stop, out.fileno(), shard.path)
            out.write(bytes(_aligned(piece.bytes, shard.alignment) - piece.bytes))
        os.fsync(out.fileno())


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
