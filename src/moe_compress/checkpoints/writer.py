"""Checkpoints written one layer at a time: a finished shard is a finished layer, the index and config come last.

Everything is written into `<out>.partial`, which becomes `<out>` by one rename at the end: kill the process at
any moment, run the same command again, and at most one layer is done twice. A folder named `<out>` is always whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe_compress.checkpoints.companions import companions, copy_companions
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
from moe_compress.checkpoints.formats.registry import QUANTIZATION
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import INDEX, Checkpoint, DerivedTensor, Entry, regions_of
from moe_compress.checkpoints.safetensors_file import STORED_DTYPES, read_regions, write_shard
from moe_compress.checkpoints.stored_tensors import stored_parts, with_weights
from moe_compress.models import hf
from moe_compress.models.prediction_layers import PREDICTION_COUNT, without_prediction_layers
from moe_compress.utils.files import room_for, write_json


class CheckpointWriter:
    """Writes one checkpoint beside its final place; `identity` says which run the partial work belongs to.

    `layers`: the layers of the source that it will have, in order (None: all); methods take the source's numbers.
    Multi-token-prediction layers are copied beside them, or left out, which config.json then says.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        identity: str,
        *,
        keep_prediction_layers: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.out = out
        self.identity = identity
        self.keep_prediction_layers = keep_prediction_layers
        self.source = source
        self.partial = partial_folder(out)
        # What config.json will say; until it is known, what the source's says.
        self.values: Mapping[str, Any] = source.values
        self.layers = list(range(source.num_layers) if layers is None else layers)
        self._begin(identity)

    def _begin(self, identity: str) -> None:
        companions(self.source.folder)  # refuses what may not be copied, before anything is written
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

    def copy(self, layer: int | None, changed: Mapping[str, Tensor | StoredWeight] | None = None) -> None:
        """Pass one layer through byte for byte, but for tensors that are `changed`, by the source's names.

        These are written in the dtypes that they were stored in, packed ones as they are. ValueError for a name that
        the source lacks.
        """
        changed = changed or {}
        keys = [*self.source.keys(layer)]
        if layer is None and self.keep_prediction_layers:
            keys += self.source.prediction_keys
        stored = {key: self.source.tensors[key] for key in keys}
        strange = sorted(changed.keys() - stored.keys())
        if strange:
            raise ValueError(f"{self.source.name} stores no tensor {strange[0]}, which was to be changed.")
        new = {
            key: each if isinstance(each, StoredWeight) else _as_stored(key, each, stored[key], self.source.dense_dtype)
            for key, each in changed.items()
        }
        made = [key for key, entry in stored.items() if isinstance(entry, DerivedTensor) and key not in new]
        with self.source.read(made) as values:
            self._put(layer, {**stored, **values, **new})

    def write(self, layer: int, tensors: Mapping[str, Tensor | StoredWeight]) -> None:
        """Write one layer's tensors, each in the dtype it was stored in; packed ones as they are."""
        entries = [self.source.tensors[key] for key in self.source.keys(layer)]
        found, dense = dict[str, Any](), self.source.dense_dtype
        # A router's bias may be wider than the weights, and is nothing to go by.
        plain = [entry for entry in entries if not isinstance(entry, StoredWeight)]
        usual = [entry for entry in plain if any(STORED_DTYPES[part.dtype] == dense for part in regions_of(entry))]
        default = next(iter([*usual, *plain, *entries]))
        for key, tensor in tensors.items():
            like = self.source.tensors.get(key, default)
            found[key] = tensor if isinstance(tensor, StoredWeight) else _as_stored(key, tensor, like, dense)
        self._put(layer, found)

    def _put(self, layer: int | None, tensors: Mapping[str, Any]) -> None:
        """Write a shard, its tensors named by the place that the layer will have."""
        beside = {key: entry for key, entry in self.source.beside.items() if hf.layer_of(key) == layer}
        tensors = {**tensors, **(beside if self._says_scales() else {})}
        if layer is not None:
            place = self.layers.index(layer)
            tensors = {hf.renumbered(key, place): tensor for key, tensor in tensors.items()}
        parts: dict[str, Any] = {}
        for key, tensor in tensors.items():
            parts |= stored_parts(key, tensor) if isinstance(tensor, StoredWeight) else {key: tensor}
        write_shard(self._shard(layer), parts)

    def _says_scales(self) -> bool:
        """Whether config.json still says what scales of a cache are for: under another kind they mean nothing."""
        before, now = (each.get(QUANTIZATION) or {} for each in (self.source.values, self.values))
        return bool(now) and all(before.get(key) == now.get(key) for key in ("quant_method", "kv_cache_scheme"))

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
        self.source.require_unchanged()
        if self.source.prediction_keys and not self.keep_prediction_layers:
            values = {PREDICTION_COUNT: 0, **without_prediction_layers(values)}
        for name, text in {**(files or {}), **hf.modelling_files(dict(values))}.items():
            with room_for(self.out / name):
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


def _as_stored(key: str, tensor: Tensor, like: Entry, dense: torch.dtype) -> Tensor:
    """In the dtype of the tensor that it takes the place of; where that was packed, in that of plain weights.

    ValueError for NaN and infinity, which no reader expects.
    """
    if not tensor.is_floating_point():
        return tensor
    regions = regions_of(like)
    kept = STORED_DTYPES[regions[0].dtype] if regions else tensor.dtype
    stored = tensor.to(dense if isinstance(like, StoredWeight) else kept)
    if not bool((stored if stored.dtype.itemsize > 1 else stored.float()).isfinite().all()):
        raise ValueError(f"{key} would hold NaN or infinity: nothing is written. Look at the plan, or at the original.")
    return stored


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """config.json; infinities, which JSON lacks, in transformers' own notation."""
    encoded = hf.encode_values(values)
    write_json(path, encoded)
