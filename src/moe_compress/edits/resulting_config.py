"""Plain or edited: which config.json values describe an edited model, and whether stock transformers builds it.

Plain means: the ordinary architecture, built without weights from the new values, is the edited model: the same
names, shapes, buffers and settings in every module. Nobody guesses; both are built and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.edits.edits import Edit, to_json
from moe_compress.models import hf
from moe_compress.models.families import COUNT_KEYS, TOP_K_KEYS, family_of
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.edit_layer import ZeroSublayer
from moe_compress.models.modeling.rerouting import REROUTE
from moe_compress.models.moe import inner_width, moe_views
from moe_compress.models.sublayers import block_names

# Config keys that number layers: one entry a layer; indices of layers without experts, or with them; how many
# layers come before the first with experts; the first and the last with experts.
WITHOUT_EXPERTS, WITH_EXPERTS = "mlp_only_layers", "moe_layers"
LEADING = ("first_k_dense_replace", "num_dense_layers")
FIRST, LAST = "moe_layer_start_index", "moe_layer_end_index"
DENSE_WIDTHS = {WITHOUT_EXPERTS: "intermediate_size", WITH_EXPERTS: "intermediate_size_mlp"}
# The width of an expert, and how many routed experts' widths a shared one has.
WIDTH_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
# The narrowest dense MLP that stands in, all zeros, for a MoE block that is gone: 16-byte rows, TP of 8 in bf16.
STAND_IN_WIDTH = 64


@dataclass(frozen=True, slots=True)
class ResultingConfig:
    """config.json values; whether they are plain; tensors by module name that the plain model has on top."""

    values: dict[str, Any]
    plain: bool
    fill: dict[str, Tensor]


def resulting_config(values: Mapping[str, Any], edits: Sequence[Edit]) -> ResultingConfig:
    """config.json values after the edits, and whether they describe a plain checkpoint."""
    base, earlier = split_values(values)
    everything = [*earlier, *map(to_json, edits)]
    if not everything:
        return ResultingConfig(base, True, {})
    if base.get("num_nextn_predict_layers"):
        # Their experts are not cut, and engines read one expert count for all layers: they are left out.
        base["num_nextn_predict_layers"] = 0
    config = hf.config_from(base)
    model = hf.skeleton(config, torch.bfloat16)
    names = block_names(model)
    edited_model.replay(model, {"moe": names, "edits": everything})
    kept = kept_layers(everything, hf.num_layers(config))
    lists = layer_lists(config, kept)
    plain = plain_form(base, config, model, lists)
    if plain is not None:
        return plain
    manifest = {"base_model_type": config.model_type, "moe": names, "edits": everything}
    runtime = {key: value for key, value in lists.items() if _settable(config, key)}
    manifest |= {"original": {key: getattr(config, key) for key in runtime}} if runtime else {}
    derived = {key: value for key, value in lists.items() if key not in runtime}
    manifest |= {"lists": derived} if derived else {}
    return ResultingConfig(hf.edited_config_values({**base, **runtime}, manifest), False, {})


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """config.json values -> (those of the original architecture, the edits already carried out)."""
    base = copy.deepcopy(dict(values))
    base.pop("auto_map", None)  # the architecture is transformers' own, and its remote code is not copied
    manifest = base.pop("moe_compress", None)
    if manifest is None:
        return base, []
    base["model_type"] = manifest["base_model_type"]
    base["architectures"] = manifest["base_architectures"]
    return {**base, **manifest.get("original", {})}, list(manifest["edits"])


def kept_layers(edits: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Which of `count` layers are left after the edits, by their first numbers."""
    kept = list(range(count))
    for edit in edits:
        if edit["edit"] == "drop_layer":
            kept.pop(edit["layer"])
    return kept


def layer_lists(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The layer count and every list by layer, for the layers that are left; nothing if all are."""
    count = hf.num_layers(config)
    if len(kept) == count:
        return {}
    names = {*config.to_dict(), *edited_model.LISTS} - {WITH_EXPERTS, WITHOUT_EXPERTS}
    found: dict[str, Any] = {}
    for name in sorted(name for name in names if "layer" in name and not name.startswith("mtp")):
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(value) == count:
            found[name] = [value[i] for i in kept]
    return {**found, "num_hidden_layers": len(kept)}


def _settable(config: PreTrainedConfig, key: str) -> bool:
    derived = getattr(type(config), key, None)
    return not isinstance(derived, property) or derived.fset is not None


# --- plain --------------------------------------------------------------------------------------------------


def plain_form(
    base: Mapping[str, Any], config: PreTrainedConfig, model: PreTrainedModel, lists: Mapping[str, Any]
) -> ResultingConfig | None:
    """The plain form, if the architecture can say what the edited model is."""
    counts = {view.num_experts for view in moe_views(model).values()}
    active = {view.top_k for view in moe_views(model).values()}
    if len(counts) != 1 or len(active) != 1:
        return None
    family = family_of(config)
    values = {**base, **{key: value for key, value in lists.items() if key in config.to_dict()}}
    values |= _renamed(base, config, family.count_key, COUNT_KEYS, counts.pop())
    values |= _renamed(base, config, family.top_k_key, TOP_K_KEYS, active.pop())
    if lists or _skipped(model):
        values |= _which_layers(config, model)
    narrower = _narrower(config, model)
    return next((form for more in narrower if (form := _if_equal({**values, **more}, model)) is not None), None)


def _narrower(config: PreTrainedConfig, model: PreTrainedModel) -> list[dict[str, int]]:
    """What the config may have to say of the experts' width, likeliest first; nothing if they kept it.

    Where shared experts are as wide as a number of routed ones, that number grows as these shrink.
    """
    widths = {inner_width(view) for view in moe_views(model).values()}
    stored = config.to_dict()
    if len(widths) != 1 or not widths.isdisjoint(stored.get(key) for key in WIDTH_KEYS):
        return [{}]
    width, found = widths.pop(), []
    for key in [key for key in WIDTH_KEYS if isinstance(stored.get(key), int)]:
        shared = [(name, stored[key] * (stored.get(name) or 0)) for name in SHARED_KEYS]
        found.append({key: width, **{name: total // width for name, total in shared if total and total % width == 0}})
    return found or [{}]


def _if_equal(values: dict[str, Any], model: PreTrainedModel) -> ResultingConfig | None:
    """The plain form with these values, if they build the edited model."""
    try:
        rebuilt = hf.skeleton(hf.config_from(values), torch.bfloat16)
    except (ValueError, IndexError, TypeError):
        return None
    if list(moe_views(rebuilt)) != list(moe_views(model)):
        return None
    stand_ins = _stand_ins(model)
    if signature(rebuilt, stand_ins) != signature(model, stand_ins) or not _same_buffers(rebuilt, model):
        return None
    fill = _fill(rebuilt, stand_ins)
    # Zeros in the place of what a config calls packed would be taken for codes.
    if fill and values.get("quantization_config"):
        return None
    # Zeros as wide as the family's real dense layers would be stored and multiplied with: better edited.
    if any(tensor.numel() > 2 * STAND_IN_WIDTH * model.config.hidden_size for tensor in fill.values()):
        return None
    return ResultingConfig(values, True, fill)


def _renamed(
    base: Mapping[str, Any], config: PreTrainedConfig, key: str, keys: Sequence[str], value: int | None
) -> dict[str, Any]:
    """The value under every name of it that the config file uses."""
    before = getattr(config, key)
    if value is None or value == before:
        return {}
    return dict.fromkeys([name for name in keys if base.get(name) == before] or [key], value)


def _which_layers(config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What the family's own keys say of the layers with experts; dense stand-ins as narrow as they may be."""
    stored, count = config.to_dict(), len(hf.decoder_layers(model))
    with_experts = list(moe_views(model))
    without = [index for index in range(count) if index not in with_experts]
    found: dict[str, Any] = {}
    if stored.get(WITHOUT_EXPERTS) is not None:
        found |= {WITHOUT_EXPERTS: without, "decoder_sparse_step": 1}
    if stored.get(WITH_EXPERTS) is not None:
        found[WITH_EXPERTS] = with_experts
    leading = with_experts[0]
    found |= {key: leading for key in LEADING if stored.get(key) is not None}
    if stored.get(FIRST) is not None and stored.get(LAST) is not None:
        found |= {FIRST: leading, LAST: with_experts[-1]}
    skipped = {index for index, _ in _skipped(model)}
    for key, width in DENSE_WIDTHS.items():
        if key in found and skipped and set(without) == skipped:
            found[width] = STAND_IN_WIDTH
    return found


def _skipped(model: PreTrainedModel) -> list[tuple[int, str]]:
    """(layer, child) of every MoE block that was removed."""
    layers = enumerate(hf.decoder_layers(model))
    return [
        (index, name)
        for index, layer in layers
        for name, child in layer.named_children()
        if isinstance(child, ZeroSublayer) and child.layer_idx is None
    ]


def _stand_ins(model: PreTrainedModel) -> tuple[str, ...]:
    """Module prefixes of removed MoE blocks and of the norms that left with them."""
    prefix = hf.layers_prefix(model)
    gone = []
    for index, name in _skipped(model):
        layer = hf.decoder_layers(model)[index]
        norms = [n for n, child in layer.named_children() if type(child) is torch.nn.Identity]
        gone += [f"{prefix}{index}.{child}" for child in (name, *norms)]
    return tuple(gone)


def _fill(rebuilt: PreTrainedModel, stand_ins: Sequence[str]) -> dict[str, Tensor]:
    """Zeros for stand-in MLPs, which then add nothing, and ones for their norms."""
    state = {n: t for n, t in rebuilt.state_dict().items() if n.startswith(tuple(f"{s}." for s in stand_ins))}
    return {name: torch.ones(t.shape) if "norm" in name else torch.zeros(t.shape) for name, t in state.items()}


# --- comparing ----------------------------------------------------------------------------------------------


def signature(model: PreTrainedModel, without: Sequence[str] = ()) -> dict[str, Any]:
    """Names, shapes and settings of every module, but for those under `without`."""
    hidden = tuple(f"{name}." for name in without)
    found: dict[str, Any] = {n: s for n, s in hf.shapes(model).items() if not n.startswith(hidden or "\0")}
    for name, module in hf.decoder_layers(model).named_modules():
        full = hf.layers_prefix(model) + name
        if not f"{full}.".startswith(hidden or "\0"):
            found[f"{full} settings"] = (type(module).__name__, _settings(module))
    return found


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """Plain values that a module keeps: layer numbers, kinds of attention, experts per token, rerouting."""
    kept = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    plain = {k: v for k, v in kept.items() if isinstance(v, int | float | str)}
    rerouted = module.__dict__.get(REROUTE, {})
    return {**plain, "alias": rerouted.get("alias"), "threshold": rerouted.get("threshold")}


def _same_buffers(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether what the models compute for themselves, and no checkpoint holds, is the same."""
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    own = (ours.keys() & theirs.keys()) - one.state_dict().keys()
    real = [name for name in own if not ours[name].is_meta and not theirs[name].is_meta]
    return all(ours[n].shape == theirs[n].shape and torch.equal(ours[n], theirs[n]) for n in real)
