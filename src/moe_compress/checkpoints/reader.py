"""Opened checkpoints: the config, where every tensor lies, and nothing read until it is asked for."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.checkpoints import deepseek_v1
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, StoredWeight
from moe_compress.checkpoints.quantization_config import require_readable
from moe_compress.checkpoints.safetensors_file import STORED_DTYPES, FileRegion, read_regions
from moe_compress.checkpoints.stored_tensors import require_agreement, with_weights
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.utils.files import read_json
from moe_compress.utils.hashing import fingerprint

INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
SAMPLE_BYTES = 4096
HASH_WHOLE_BELOW = 256 << 20


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """A tensor that is not stored as it is: computed from a stored one, or constant."""

    make: Callable[[Tensor | None], Tensor]
    source: FileRegion | None


Entry = FileRegion | DerivedTensor | StoredWeight


def regions_of(entry: Entry) -> list[FileRegion]:
    """Where the bytes of a tensor lie, those that say its dtype first; nowhere for a constant."""
    if isinstance(entry, StoredWeight):
        return list(entry.parts().values())
    found = entry if isinstance(entry, FileRegion) else entry.source
    return [] if found is None else [found]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name` is what the user called it, `commit` its hub revision if it has one.

    tensors: by name; a packed matrix is one tensor, under the name of its weights.
    """

    folder: Path
    name: str
    values: dict[str, Any]
    tensors: dict[str, Entry] = field(repr=False)
    commit: str | None = None

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The config object."""
        return hf.config_from(self.values)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config object of the language model: of a wrapper, the part that says of layers and words."""
        return self.config.get_text_config()

    @functools.cached_property
    def num_layers(self) -> int:
        """Decoder layers (extra prediction layers behind them are not counted)."""
        return hf.num_layers(self.config)

    def keys(self, layer: int | None) -> list[str]:
        """Tensor names of one layer; None: all that belong to no decoder layer."""
        return self._keys_by_layer.get(layer, [])

    @functools.cached_property
    def _keys_by_layer(self) -> dict[int | None, list[str]]:
        groups: dict[int | None, list[str]] = {}
        for key in self.tensors:
            groups.setdefault(hf.layer_of(key), []).append(key)
        return groups

    @property
    def extra_layers(self) -> list[int]:
        """Indices of stored layers that the model does not have (multi-token prediction)."""
        return sorted(i for i in self._keys_by_layer if i is not None and i >= self.num_layers)

    @property
    def stored_dtype(self) -> torch.dtype:
        """A dtype that holds every stored value exactly: the common one, or fp32 where they differ."""
        stored = {region.dtype for entry in self.tensors.values() for region in regions_of(entry)[:1]}
        floating = {STORED_DTYPES[name] for name in stored if STORED_DTYPES[name].is_floating_point}
        return floating.pop() if len(floating) == 1 else torch.float32

    @property
    def bytes(self) -> int:
        """Stored size of all tensors."""
        return sum(region.bytes for entry in self.tensors.values() for region in regions_of(entry))

    @property
    def packed(self) -> list[str]:
        """Names of the matrices that are stored packed."""
        return [key for key, entry in self.tensors.items() if isinstance(entry, PackedWeight)]

    def layer_bytes(self, layer: int | None) -> int:
        """Stored size of one layer."""
        return sum(region.bytes for key in self.keys(layer) for region in regions_of(self.tensors[key]))

    def skeleton(self, dtype: torch.dtype, attn: str | None = None) -> PreTrainedModel:
        """The model without weights, which gives tensors the names that they have here."""
        model = hf.skeleton(self.config, dtype, attn, towers=self.holds_towers)
        hf.remember_names(model, self.tensors)
        return model

    @functools.cached_property
    def auto_class(self) -> Any:
        """The auto class by which stock transformers loads it."""
        return hf.auto_class(self.config, self.holds_towers)

    @functools.cached_property
    def holds_towers(self) -> bool:
        """Whether a wrapper holds anything beside its language model; some are published without."""
        wrapped = hf.is_wrapper(self.config)
        return wrapped and hf.holds_towers(hf.skeleton(self.config, self.stored_dtype), self.keys(None))

    @contextlib.contextmanager
    def read(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors by name, read lazily; the files are mapped only inside the block."""
        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}

            def lazy(region: FileRegion) -> Any:
                if region.file not in files:
                    files[region.file] = stack.enter_context(safe_open(region.file, "pt"))
                return files[region.file].get_slice(region.key)

            found = {key: _opened(self.tensors[key], lazy) for key in keys}
            yield found
            found.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of config and weights: all bytes of a small checkpoint, a sample of every tensor of a large one."""
        whole = self.bytes < HASH_WHOLE_BELOW
        return fingerprint(self.values, *(part for key in sorted(self.tensors) for part in self._sample(key, whole)))

    def _sample(self, key: str, whole: bool) -> list[Any]:
        entry = self.tensors[key]
        found: list[Any] = [key]
        for region in regions_of(entry):
            with region.file.open("rb") as file:
                file.seek(region.start)
                found += [region.dtype, region.shape, file.read(region.bytes if whole else SAMPLE_BYTES)]
        return found


def _opened(entry: Entry, lazy: Callable[[FileRegion], Any]) -> Any:
    """A tensor as something that is read when it is asked for."""
    if isinstance(entry, FileRegion):
        return lazy(entry)
    if isinstance(entry, StoredWeight):
        return entry.each(lazy)
    return entry.make(None if entry.source is None else lazy(entry.source)[:])


def open_checkpoint(folder: Path, name: str | None = None, commit: str | None = None) -> Checkpoint:
    """Open a local checkpoint folder; ValueError says what is missing, truncated or left over."""
    values = architecture_values(folder)
    stored = _stored_tensors(folder)
    foreign = sorted({region.dtype for region in stored.values()} - STORED_DTYPES.keys())
    if foreign:
        raise ValueError(
            f"{folder} holds tensors of type {foreign[0]}, which is not read yet: use a bf16 or fp32 copy."
        )
    tensors: dict[str, Entry] = with_weights(stored, values)
    require_agreement(folder, values, tensors)
    if deepseek_v1.recognises(read_json(folder / "config.json")):
        tensors = _reexpressed(values, tensors)
    checkpoint = Checkpoint(folder, name or str(folder), values, tensors, commit)
    _require_layers(checkpoint)
    return checkpoint


def architecture_values(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, of an architecture that transformers has (DeepSeek-MoE v1 re-expressed)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a (finished) checkpoint.")
    if not isinstance(read_json(folder / "config.json"), dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object, so it is no config.")
    values = hf.read_values(folder)
    require_readable(folder, values)
    if deepseek_v1.recognises(values):
        values = deepseek_v1.config_values(values)
    _require_supported(folder, values)
    return values


def _require_supported(folder: Path, values: dict[str, Any]) -> None:
    """Raise ValueError unless the values make a config of a family that is known and not refused."""
    manifest = values.get("moe_compress", {"edits": [], "moe": {}, "base_model_type": ""})
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / 'config.json'} says moe_compress={manifest!r}, which holds no edits.")
    absent = [key for key in ("edits", "moe", "base_model_type") if key not in manifest]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks moe_compress.{absent[0]}: it was changed; make it anew.")
    try:
        family_of(hf.config_from(values))
    except (TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split()[:40])
        raise ValueError(f"{folder / 'config.json'} is no {values['model_type']} config: {said}") from error


def _stored_tensors(folder: Path) -> dict[str, FileRegion]:
    single = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        if single.is_file():
            raise ValueError(f"{folder} holds both {single.name} and {INDEX}: remove the one that does not belong.")
        return _sharded(folder)
    if not single.is_file():
        raise ValueError(
            f"{folder} holds neither model.safetensors nor {INDEX}: only safetensors checkpoints are read."
        )
    return read_regions(single)


def _sharded(folder: Path) -> dict[str, FileRegion]:
    index = _weight_map(folder / INDEX)
    listed = sorted(set(index.values()))
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(listed)} shards: {', '.join(missing[:3])}.")
    extra = [
        p.name for p in folder.glob("model-*.safetensors") if SHARD_NAME.fullmatch(p.name) and p.name not in listed
    ]
    if extra:
        raise ValueError(f"{folder} holds shards that its index does not list: {', '.join(sorted(extra)[:3])}.")
    found = [(key, region) for name in listed for key, region in read_regions(folder / name).items()]
    odd = sorted({key for key, region in found if index.get(key) != region.file.name} | (index.keys() - dict(found)))
    if odd:
        raise ValueError(f"the index and the shards of {folder} disagree about {len(odd)} tensors, such as {odd[0]}.")
    return dict(found)


def _weight_map(path: Path) -> dict[str, str]:
    content = read_json(path)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path} lists no tensors: it is broken; fetch it again.")
    return index


def _reexpressed(values: dict[str, Any], tensors: dict[str, Entry]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    for key, entry in tensors.items():
        (region,) = regions_of(entry)
        new_key, make = deepseek_v1.rename(key)
        out[new_key] = region if make is None else DerivedTensor(make, region)
    dtype = STORED_DTYPES[regions_of(out["model.embed_tokens.weight"])[0].dtype]
    zero_gate = torch.zeros(1, int(values["hidden_size"]), dtype=dtype)
    for key in deepseek_v1.constant_keys(out):
        out[key] = DerivedTensor(lambda _: zero_gate, None)
    return out


def _require_layers(checkpoint: Checkpoint) -> None:
    absent = [i for i in range(checkpoint.num_layers) if not checkpoint.keys(i)]
    if absent:
        raise ValueError(
            f"{checkpoint.folder} holds no tensors for layers {absent[:5]}, though its config counts "
            f"{checkpoint.num_layers} layers."
        )
