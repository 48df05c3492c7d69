"""Checkpoints written one layer at a time: a finished shard is a finished layer, the index and config come last.

Everything is written into `<out>.partial`, which becomes `<out>` by one rename at the end: kill the process at
any moment, run the same command again, and at most one layer is done twice. A folder named `<out>` is always whole.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moe_compress.checkpoints.folder import (
    MANIFEST,
    SCRATCH,
    STATE,
    _require_ours,
    begun_identity,
    clear_partial,
    partial_folder,
    remove_scratch,
)
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import INDEX, Checkpoint, DerivedTensor, Entry, regions_of
from moe_compress.checkpoints.safetensors_file import STORED_DTYPES, read_regions, write_shard
from moe_compress.checkpoints.stored_tensors import stored_parts, with_weights
from moe_compress.models import hf
from moe_compress.utils.files import write_json

COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


class CheckpointWriter:
    """Writes one checkpoint beside its final place; `identity` says which run the partial work belongs to.

    `layers`: the layers of the source that it will have, in order (None: all); methods take the source's numbers.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        identity: str,
        *,
        keep_extra_layers: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.out = out
        self.extra = source.extra_layers if keep_extra_layers else []
        self.source = source
        self.partial = partial_folder(out)
        # What config.json will say; until it is known, what the source's says.
        self.values: Mapping[str, Any] = source.values
        self.layers = list(range(source.num_layers) if layers is None else layers)
        self._begin(identity)

    def _begin(self, identity: str) -> None:
        _require_ours(self.partial)
        if begun_identity(self.partial) not in (None, identity):
            clear_partial(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / STATE, {"identity": identity})

    def _shard(self, layer: int | None) -> Path:
        number = 1 if layer is None else self.layers.index(layer) + 2
        return self.partial / f"model-{number:05d}-of-{len(self.layers) + 1:05d}.safetensors"

    def has(self, layer: int | None) -> bool:
        """Whether this layer (None: everything outside layers) is already on disk, whole."""
        return self._shard(layer).is_file()

    @property
    def scratch(self) -> Path:
        """A folder for what a run must remember until the checkpoint is finished."""
        return self.partial / SCRATCH

    @contextlib.contextmanager
    def read(self, layer: int) -> Iterator[dict[str, Any]]:
        """A written layer's tensors, read where they are used, by the source's names."""
        with safe_open(self._shard(layer), "pt") as shard:
            named = {hf.renumbered(key, layer): shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
            yield with_weights(named, self.values)

    def copy(self, layer: int | None) -> None:
        """Pass one layer through untouched, byte for byte."""
        keys = list(self.source.keys(layer))
        for extra in self.extra if layer is None else ():
            keys += self.source.keys(extra)
        stored = {key: self.source.tensors[key] for key in keys}
        made = [key for key, entry in stored.items() if isinstance(entry, DerivedTensor)]
        with self.source.read(made) as values:
            self._put(layer, {**stored, **values})

    def write(self, layer: int, tensors: Mapping[str, Tensor | StoredWeight]) -> None:
        """Write one layer's tensors, each in the dtype it was stored in; packed ones as they are."""
        default = self.source.tensors[self.source.keys(layer)[0]]
        found: dict[str, Any] = {}
        for key, tensor in tensors.items():
            like = self.source.tensors.get(key, default)
            found[key] = tensor if isinstance(tensor, StoredWeight) else _as_stored(tensor, like)
        self._put(layer, found)

    def _put(self, layer: int | None, tensors: Mapping[str, Any]) -> None:
        """Write a shard, its tensors named by the place that the layer will have."""
        if layer is not None:
            place = self.layers.index(layer)
            tensors = {hf.renumbered(key, place): tensor for key, tensor in tensors.items()}
        parts: dict[str, Any] = {}
        for key, tensor in tensors.items():
            parts |= stored_parts(key, tensor) if isinstance(tensor, StoredWeight) else {key: tensor}
        write_shard(self._shard(layer), parts)

    def finish(
        self,
        values: Mapping[str, Any],
        manifest: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        arrays: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write what makes it a checkpoint: companions, `files`, manifest, index, config; then give it its name.

        files: texts by file name; arrays: tensors by file name (none where there are none).
        """
        for name, text in {**(files or {}), **hf.modelling_files(dict(values))}.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        for name, tensors in (arrays or {}).items():
            if tensors:
                write_shard(self.partial / name, tensors)
        copy_companions(self.source.folder, self.partial)
        write_json(self.partial / MANIFEST, manifest)
        shards = [self._shard(None), *map(self._shard, self.layers)]
        regions = {path.name: read_regions(path) for path in shards}
        weight_map = {key: name for name, found in regions.items() for key in found}
        total = sum(region.bytes for found in regions.values() for region in found.values())
        write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_config(self.partial / "config.json", values)
        (self.partial / STATE).unlink()
        self.partial.rename(self.out)
        remove_scratch(self.out)


def _as_stored(tensor: Tensor, like: Entry) -> Tensor:
    regions = regions_of(like)
    return tensor.to(STORED_DTYPES[regions[0].dtype]) if regions and tensor.is_floating_point() else tensor


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """config.json; infinities, which JSON lacks, in transformers' own notation."""
    encoded = hf.encode_values(values)
    write_json(path, encoded)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, chat template, generation config and licence files."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
