"""Opened checkpoints: the config, where every tensor lies, and nothing read until it is asked for."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.checkpoints import deepseek_v1
from moe_compress.checkpoints.familiar_types import familiar_type, known_values, require_same_tensors
from moe_compress.checkpoints.file_digests import Stamp, digests, stamp
from moe_compress.checkpoints.formats.registry import format_in
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, StoredWeight
from moe_compress.checkpoints.numbering import require_numbering
from moe_compress.checkpoints.quantization_config import require_readable, with_export, with_inner_config
from moe_compress.checkpoints.safetensors_file import STORED_DTYPES, FileRegion, read_regions
from moe_compress.checkpoints.stored_tensors import beside_weights, require_agreement, with_weights
from moe_compress.checkpoints.stored_twice import require_stored_once
from moe_compress.edits.manifest import require_manifest
from moe_compress.models import hf
from moe_compress.models.families import REFUSED, family_of
from moe_compress.models.modeling.bit_packing import WORD
from moe_compress.models.modeling.edited_model import PREFIX
from moe_compress.models.prediction_layers import module_pattern, prediction_layers
from moe_compress.utils.files import read_json
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# Above this, files are known by their digests, and read once to have them.
SMALL = 256 << 20
CHUNK = 16 << 20


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


def packed_size(entry: Entry) -> tuple[int, int, int]:
    """Of a packed matrix: how many numbers it has, how many scales, and the bytes of all but the scales."""
    scales, *others = regions_of(entry)
    bits = getattr(entry, "bits", None) or WORD // 8
    return others[0].bytes * 8 // bits, math.prod(scales.shape), sum(each.bytes for each in others)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name` is what the user called it, `commit` its hub revision if it has one.

    tensors: by name; a packed matrix is one tensor, under the name of its weights; stamps: of its files, when opened;
    beside: what no module holds, but engines read (scales of a cache).
    """

    folder: Path
    name: str
    values: dict[str, Any]
    tensors: dict[str, Entry] = field(repr=False)
    commit: str | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False, compare=False)
    beside: dict[str, FileRegion] = field(default_factory=dict, repr=False)

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
        """Tensor names of one layer; None: all that belong to no decoder layer and predict no further tokens."""
        return self._keys_by_layer.get(layer, [])

    @functools.cached_property
    def _keys_by_layer(self) -> dict[int | None, list[str]]:
        groups: dict[int | None, list[str]] = {}
        apart = set(self.prediction_keys)
        for key in self.tensors:
            if key not in apart:
                groups.setdefault(hf.layer_of(key), []).append(key)
        return groups

    @functools.cached_property
    def prediction_keys(self) -> list[str]:
        """Tensor names of multi-token-prediction layers, which the model does not have."""
        return [key for key in self.tensors if hf.is_prediction_key(key, self.num_layers)]

    @property
    def prediction_modules(self) -> list[str]:
        """Patterns of the names of their modules."""
        return [*dict.fromkeys(module_pattern(key, hf.layer_of(key)) for key in self.prediction_keys)]

    @property
    def stored_dtype(self) -> torch.dtype:
        """A dtype that holds every stored value exactly: the common one, or fp32 where they differ."""
        stored = {region.dtype for entry in self.tensors.values() for region in regions_of(entry)[:1]}
        floating = {STORED_DTYPES[name] for name in stored if STORED_DTYPES[name].is_floating_point}
        return floating.pop() if len(floating) == 1 else torch.float32

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of its weights where they are plain numbers."""
        packed = any(isinstance(entry, StoredWeight) for entry in self.tensors.values())
        return hf.stored_dtype(self.values) if packed else self.stored_dtype

    @property
    def bytes(self) -> int:
        """Stored size of all tensors."""
        entries = [*self.tensors.values(), *self.beside.values()]
        return sum(region.bytes for entry in entries for region in regions_of(entry))

    @property
    def packed(self) -> list[str]:
        """Names of the matrices that are stored packed, and stay so in memory."""
        return [key for key, entry in self.tensors.items() if isinstance(entry, PackedWeight) and entry.stays_packed]

    @property
    def loads_as_stock(self) -> bool:
        """Whether stock transformers is to load it whole: plain numbers, or what it has kernels for.

        Its kernels know the layers of ordinary architectures alone.
        """
        stored = any(isinstance(entry, StoredWeight) for entry in self.tensors.values())
        return not stored or (format_in(self.values).kept_by_stock and "moe_compress" not in self.values)

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
        """Identity of config and weights, all bytes of them: by tensors, of a large checkpoint by files."""
        if self.bytes < SMALL:
            return fingerprint(self.values, *(part for key in sorted(self.tensors) for part in self._whole(key)))
        files = {region.file for entry in self.tensors.values() for region in regions_of(entry)}
        return fingerprint(self.values, sorted(digests(files).items()))

    def _whole(self, key: str) -> list[Any]:
        found: list[Any] = [key]
        for region in regions_of(self.tensors[key]):
            with region.file.open("rb") as file:
                file.seek(region.start)
                found += [region.dtype, region.shape, file.read(region.bytes)]
        return found

    def require_unchanged(self) -> None:
        """ValueError if one of its files is not what it was when the checkpoint was opened."""
        for path, before in self.stamps.items():
            if not path.is_file() or stamp(path) != before:
                raise ValueError(
                    f"{path} changed while it was being read: what was made of it is of no model. Run again once "
                    "nothing writes to it."
                )


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
    values = _as_stock_ties(folder, values, tensors)
    for key, name in hf.moved(read_json(folder / "config.json")).items():
        log.warning("%s says %s, which transformers passes over: it is read as %s.", folder, key, name)
    stamps = {path: stamp(path) for path in {folder / "config.json", *(region.file for region in stored.values())}}
    beside = {key: stored[key] for key in beside_weights(stored, values)}
    checkpoint = Checkpoint(folder, name or str(folder), values, tensors, commit, stamps, beside)
    _require_layers(checkpoint)
    require_numbering(folder, tensors, checkpoint.num_layers)
    require_stored_once(folder, tensors)
    _require_no_more_layers(checkpoint)
    if familiar_type(read_json(folder / "config.json")) is not None:
        apart = set(checkpoint.prediction_keys)
        shapes = {key: getattr(entry, "shape", None) for key, entry in tensors.items() if key not in apart}
        require_same_tensors(folder, values, shapes)
    return checkpoint


def _as_stock_ties(folder: Path, values: dict[str, Any], tensors: Mapping[str, Entry]) -> dict[str, Any]:
    """Config values that tie nothing where a head of its own is stored: stock transformers then does not tie either."""
    for name, other in hf.tied_names(hf.config_from(values)).items():
        pair = [entry for key in (name, other) if isinstance(entry := tensors.get(key), FileRegion)]
        if len(pair) == 2 and not _equal(*pair):
            log.warning("%s stores %s apart from %s, which its config ties: they are not tied.", folder, name, other)
            return {**values, "tie_word_embeddings": False}
    return values


def _equal(one: FileRegion, other: FileRegion) -> bool:
    """Whether two stored tensors are the same to the last bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        starts = range(0, one.bytes, CHUNK)
        return all(first.read(min(CHUNK, one.bytes - n)) == second.read(min(CHUNK, one.bytes - n)) for n in starts)


def architecture_values(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, of an architecture that transformers has (DeepSeek-MoE v1 re-expressed)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a (finished) checkpoint.")
    if not isinstance(read_json(folder / "config.json"), dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object, so it is no config.")
    values = with_export(folder, with_inner_config(known_values(hf.read_values(folder))))
    require_readable(folder, values)
    if deepseek_v1.recognises(values):
        values = deepseek_v1.config_values(values)
    _require_supported(folder, values)
    return values


def _require_supported(folder: Path, values: dict[str, Any]) -> None:
    """Raise ValueError unless the values make a config of a family that is known and not refused."""
    try:
        if "moe_compress" in values or str(values.get("model_type")).startswith(PREFIX):
            require_manifest(values)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        said = str(error).rstrip(".")
        raise ValueError(f"{folder / 'config.json'}: {said}: it was changed; make the checkpoint anew.") from error
    base_type = (values.get("moe_compress") or {}).get("base_model_type") or values.get("model_type")
    if (reason := REFUSED.get(str(base_type))) is not None:
        raise ValueError(f"{base_type} is not supported: {reason}.")
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


def _require_no_more_layers(checkpoint: Checkpoint) -> None:
    """Raise ValueError for layers behind the last one where no config and no class speaks of prediction layers."""
    further = [key for key in checkpoint.prediction_keys if (hf.layer_of(key) or 0) >= checkpoint.num_layers]
    if further and not prediction_layers(checkpoint.values) and not hf.passes_over(checkpoint.config, further[0]):
        raise ValueError(
            f"{checkpoint.folder} holds {further[0]}, but its config counts {checkpoint.num_layers} layers and no more "
            "that predict further tokens: one of the two is of another model."
        )
