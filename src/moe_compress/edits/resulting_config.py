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

from moe_compress.edits.apply import carry_out
from moe_compress.edits.dense_form import dense_values
from moe_compress.edits.dense_layers import is_dense_edit
from moe_compress.edits.edits import Edit, to_json
from moe_compress.models import hf
from moe_compress.models.families import COUNT_KEYS, TOP_K_KEYS, Family, entry_of, family_of, setting, with_settings
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.edit_layer import ZeroSublayer
from moe_compress.models.modeling.rerouting import REROUTE
from moe_compress.models.moe import inner_width, moe_views
from moe_compress.models.prediction_layers import without_prediction_layers
from moe_compress.models.sublayers import block_names

# The narrowest dense MLP that stands in, all zeros, for a MoE block that is gone: 16-byte rows, TP of 8 in bf16.
STAND_IN_WIDTH = 64
# Edits whose outcome no ordinary architecture is.
OWN_MODULES = ("pack_matrices", "factor_experts")


@dataclass(frozen=True, slots=True)
class ResultingConfig:
    """config.json values; whether they are plain; tensors by module name that the plain model has on top.

    dense: whether they are those of an architecture without experts.
    """

    values: dict[str, Any]
    plain: bool
    fill: dict[str, Tensor]
    dense: bool = False


def resulting_config(values: Mapping[str, Any], edits: Sequence[Edit]) -> ResultingConfig:
    """config.json values after the edits, and whether they describe a plain checkpoint.

    Raises ValueError where a wrapper's language model would have layers that its config cannot say.
    """
    base, earlier = split_values(values)
    everything = [*earlier, *map(to_json, edits)]
    if not everything:
        return ResultingConfig(base, True, {})
    # Prediction layers are left out: their experts are not cut, and engines read one expert count for all layers.
    base = without_prediction_layers(base)
    config = hf.config_from(base)
    model = hf.skeleton(config, torch.bfloat16)
    names = block_names(model)
    lists = layer_lists(config, kept_layers(everything, hf.num_layers(config)))
    if any(map(is_dense_edit, everything)):
        for edit in everything:
            carry_out(model, names, edit)
        return ResultingConfig(dense_values(base, model, names["block"], lists, everything), True, {}, dense=True)
    # Modules that hold codes or factors are no stock model's: hundreds a layer are not made to find that out.
    if not any(edit["edit"] in OWN_MODULES for edit in everything):
        for edit in everything:
            edited_model.apply(hf.stack(model), names, edit)
        plain = plain_form(base, config, model, lists)
        if plain is not None:
            return plain
    if hf.is_wrapper(config):
        raise ValueError(
            f"the language model inside {config.model_type} would have layers that differ from what its config can "
            "say, and a wrapper has no other form: choose the same number of experts, experts per token and neurons in "
            "every layer, no factors, and a format that stock transformers reads."
        )
    manifest = {"base_model_type": config.model_type, "moe": names, "edits": everything}
    runtime = {key: value for key, value in lists.items() if _settable(config, key)}
    manifest |= {"original": {key: getattr(config, key) for key in runtime}} if runtime else {}
    derived = {key: value for key, value in lists.items() if key not in runtime}
    manifest |= {"lists": derived} if derived else {}
    return ResultingConfig(hf.edited_config_values({**base, **runtime}, manifest), False, {})


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """config.json values -> (those of the original architecture, the edits already carried out)."""
    base = copy.deepcopy(dict(values))
    # The architecture is transformers' own, and its remote code is not copied; that of tokenizers and processors is.
    code = base.pop("auto_map", None)
    kept = {key: entry for key, entry in code.items() if key in hf.PROCESSORS} if isinstance(code, Mapping) else {}
    base |= {"auto_map": kept} if kept else {}
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
    count, family, config = hf.num_layers(config), entry_of(config), config.get_text_config()
    if len(kept) == count:
        return {}
    names = {*config.to_dict(), *edited_model.LISTS} - {family.moe_list_key, family.dense_list_key}
    found: dict[str, Any] = {}
    for name in sorted(n for n in names if ("layer" in n or n.endswith("_types")) and not n.startswith("mtp")):
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(value) == count:
            found[name] = [value[i] for i in kept]
    return {**found, family.layers_key: len(kept)}


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
    family, config, text = family_of(config), config.get_text_config(), hf.text_values(base)
    values = {**text, **{key: value for key, value in lists.items() if key in config.to_dict()}}
    values = with_settings(values, _renamed(text, config, family.count_key, COUNT_KEYS, counts.pop()))
    values = with_settings(values, _renamed(text, config, family.top_k_key, TOP_K_KEYS, active.pop()))
    if lists or _skipped(model):
        values |= _which_layers(config, family, model)
    tried = (hf.with_text_values(base, with_settings(values, more)) for more in _narrower(config, family, model))
    return next((form for found in tried if (form := _if_equal(found, model)) is not None), None)


def _narrower(config: PreTrainedConfig, family: Family, model: PreTrainedModel) -> list[dict[str, int]]:
    """What the config may have to say of the experts' width, likeliest first; nothing if they kept it.

    Where shared experts are as wide as a number of routed ones, that number grows as these shrink.
    """
    widths = {inner_width(view) for view in moe_views(model).values()}
    keys, every = (*family.width_keys, *family.shared_count_keys), config.to_dict()
    stored = {key: value for key in keys if isinstance(value := setting(every, key), int)}
    if len(widths) != 1 or not widths.isdisjoint(stored.get(key) for key in family.width_keys):
        return [{}]
    width, found = widths.pop(), []
    for key in [key for key in family.width_keys if key in stored]:
        shared = [(name, stored[key] * stored.get(name, 0)) for name in family.shared_count_keys]
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
    widest = 2 * STAND_IN_WIDTH * model.config.get_text_config().hidden_size
    if any(tensor.numel() > widest for tensor in fill.values()):
        return None
    return ResultingConfig(values, True, fill)


def _renamed(
    base: Mapping[str, Any], config: PreTrainedConfig, key: str, keys: Sequence[str], value: int | None
) -> dict[str, Any]:
    """The value under every name of it that the config file uses."""
    before = setting(config, key)
    if value is None or value == before:
        return {}
    return dict.fromkeys([name for name in (key, *keys) if setting(base, name) == before] or [key], value)


def _which_layers(config: PreTrainedConfig, family: Family, model: PreTrainedModel) -> dict[str, Any]:
    """What the family's own keys say of the layers with experts; dense stand-ins as narrow as they may be."""
    stored, count = config.to_dict(), len(hf.decoder_layers(model))
    with_experts = list(moe_views(model))
    without = [index for index in range(count) if index not in with_experts]
    found: dict[str, Any] = {}
    if stored.get(family.dense_list_key) is not None:
        found |= {family.dense_list_key: without, family.dense_period_key: 1}
    if stored.get(family.moe_list_key) is not None:
        found[family.moe_list_key] = with_experts
    listed = bool(found)
    leading, ends = with_experts[0], (with_experts[0], with_experts[-1])
    found |= {key: leading for key in family.leading_dense_keys if stored.get(key) is not None}
    if all(stored.get(key) is not None for key in family.moe_range_keys):
        found |= dict(zip(family.moe_range_keys, ends, strict=False))
    skipped = {index for index, _ in _skipped(model)}
    if listed and skipped and set(without) == skipped:
        found[family.dense_width_key] = STAND_IN_WIDTH
    return found


def _skipped(model: PreTrainedModel) -> list[tuple[int, str]]:
    """(layer, child) of every MoE block that was removed."""
    layers = enumerate(hf.decoder_layers(model))
    return [
        (index, name)
        for index, layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, ZeroSublayer) and module.layer_idx is None
    ]


def _stand_ins(model: PreTrainedModel) -> tuple[str, ...]:
    """Module prefixes of removed MoE blocks and of the norms that left with them."""
    prefix = hf.layers_prefix(model)
    gone = []
    for index, name in _skipped(model):
        layer = hf.decoder_layers(model)[index]
        norms = [n for n, module in layer.named_modules() if type(module) is torch.nn.Identity]
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
