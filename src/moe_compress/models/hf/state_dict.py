"""Checkpoint tensors <-> parameters, both ways, one layer at a time, by transformers' own conversion rules.

Most families store one matrix an expert and compute with fused tensors. The common conversion (stack the experts,
join gate and up) is done here straight into the fused tensor, so that a layer in the making exists once; whatever
else a family needs is left to transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from moe_compress.models.hf.expert_taps import FLAT, USED
from moe_compress.models.hf.skeleton import decoder_layers, layers_prefix, quiet, text_prefixes
from moe_compress.models.modeling.edited_model import conversions
from moe_compress.models.prediction_layers import predicts_further

# Layers of other towers (`vision_tower.encoder.layers.0`) and of further predictions (`mtp.layers.0`) are none of them.
LAYER_KEY = re.compile(
    r"^(?:(?:(?:model|backbone|transformer|decoder|language_model|llm|text_model|thinker)\.)*layers|transformer\.blocks)"
    r"\.(\d+)\."
)
FIRST_NUMBER = re.compile(r"^.*?\.(\d+)\.")
# Where a skeleton keeps what the names of its checkpoint's decoder layers begin with.
STORED_PREFIX = "_moe_compress_stored_prefix"


def layer_of(key: str) -> int | None:
    """Which decoder layer a checkpoint tensor belongs to; None for embeddings, final norm and head.

    Layers inside a module of prediction layers are numbered for themselves: they are none of these.
    """
    found = None if predicts_further(key) else LAYER_KEY.search(key)
    return int(found.group(1)) if found else None


def is_prediction_key(key: str, num_layers: int) -> bool:
    """Whether a checkpoint tensor belongs to a multi-token-prediction layer of a model of `num_layers` layers."""
    return predicts_further(key) or (layer_of(key) or 0) >= num_layers


def knows_prediction_layers(model: PreTrainedModel) -> bool:
    """Whether the architecture is published with multi-token-prediction layers, which its classes then pass over."""
    return any("mtp" in pattern for pattern in model._keys_to_ignore_on_load_unexpected or ())


def remember_names(model: PreTrainedModel, keys: Iterable[str]) -> None:
    """Let a skeleton give its layers' tensors the names of the checkpoint with these keys.

    One model is stored under several names: `model.layers`, `model.language_model.layers`. transformers reads them all.
    """
    found = next(filter(None, map(LAYER_KEY.search, keys)), None)
    if found is not None:
        model.__dict__[STORED_PREFIX] = found.group()[: found.start(1)]


def _as_stored(model: PreTrainedModel, key: str) -> str:
    """The name of a layer's tensor in the checkpoint that the model was made for, if that is known.

    Of Kimi-K2.5, transformers would save decoder layers as `blocks`, which it does not read again.
    """
    prefix = model.__dict__.get(STORED_PREFIX) or ("" if LAYER_KEY.match(key) else layers_prefix(model))
    return FIRST_NUMBER.sub(rf"{prefix}\1.", key) if prefix else key


def renumbered(key: str, layer: int) -> str:
    """The name of the same tensor in another decoder layer."""
    found = LAYER_KEY.search(key)
    assert found is not None, f"{key} belongs to no layer"
    return f"{key[: found.start(1)]}{layer}{key[found.end(1) :]}"


def materialize(
    model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device, *, towers: bool = False
) -> None:
    """Put checkpoint tensors (or safetensors slices) into the skeleton's parameters, converted and cast.

    towers: those of a wrapper's other towers as well, which are left alone otherwise. Raises ValueError when a tensor
    fits no parameter, has the wrong shape or holds no floating-point weights.
    """
    mapping = _conversions(model)
    # Not its state_dict, for which packed weights would leave their kernel's layout.
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    expected: dict[str, Tensor] = {name: tensor for pairs in named for name, tensor in pairs}
    converters = {pattern: c for c in mapping if hasattr(c, "operations") for pattern in c.source_patterns}
    wanted = ("",) if towers else text_prefixes(model)
    for name, by_pattern in _by_parameter(model, mapping, expected, tensors).items():
        if not name.startswith(wanted):
            continue
        _require_weights(by_pattern, name, expected)
        _require_one_source(by_pattern, name)
        converter = converters.get(next(iter(by_pattern)))
        if converter is not None and not _stacks(converter):
            _convert(model, mapping, {k: t for found in by_pattern.values() for k, t in found.items()}, device)
            continue
        if name not in expected:
            if _is_ignored(model, name):
                continue
            raise ValueError(f"the checkpoint's tensor for {name} fits nothing in {type(model).__name__}.")
        target = expected[name]
        value = torch.empty(target.shape, dtype=target.dtype, device=device)
        if converter is None:
            (source,) = by_pattern[""].values()
            _fill(value, source[...], name)
        else:
            _stack(value, converter, by_pattern, name)
        _assign(model, name, value)
    used = [conversion for conversion in mapping if conversion.was_used()]
    model.__dict__[USED] = [*conversions(model.__dict__.get(FLAT, ())), *used]


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether stock transformers passes over a stored tensor that fits nothing (buffers that a model makes itself)."""
    found = LoadStateDictInfo(set(), {name}, set(), error_msgs=[], conversion_errors={}, skipped_pp_keys=set())
    model._adjust_missing_and_unexpected_keys(found)
    return not found.unexpected_keys


def holds_towers(model: PreTrainedModel, keys: Iterable[str]) -> bool:
    """Whether a checkpoint with these keys holds any of a wrapper's towers beside its language model."""
    read, expected = text_prefixes(model), model.state_dict()
    names = _by_parameter(model, _conversions(model), expected, dict.fromkeys(keys))
    return any(name in expected and not name.startswith(read) for name in names)


def _conversions(model: PreTrainedModel) -> list[Any]:
    """What is to be done with a checkpoint's tensors: transformers' own conversions, and those to stacks of experts."""
    return [*conversions(model.__dict__.get(FLAT, ())), *get_model_conversion_mapping(model)]


def _by_parameter(
    model: PreTrainedModel, mapping: list[Any], expected: Mapping[str, Tensor], tensors: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
    """parameter -> pattern of the conversion ("" for none) -> checkpoint tensors by name, experts in order."""
    renamings = [m for m in mapping if not hasattr(m, "operations")]
    converters = [m for m in mapping if hasattr(m, "operations")]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(expected))
        if name not in expected and key in expected:  # it was meant for other names
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, dict(expected))
        groups.setdefault(name, {}).setdefault(pattern or "", {})[key] = tensors[key]
    return groups


def _stacks(converter: Any) -> bool:
    """Whether a conversion only stacks experts, and perhaps joins their matrices by rows."""
    operations = converter.operations
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    joins = operations[1:]
    return len(joins) <= 1 and all(type(join) is Concatenate and join.dim == 1 for join in joins)


def _require_weights(by_pattern: Mapping[str, Mapping[str, Any]], name: str, expected: Mapping[str, Tensor]) -> None:
    """Whole numbers where a parameter is floating are codes of some quantization, not weights: never cast them."""
    if name not in expected or not expected[name].is_floating_point():
        return
    for found in by_pattern.values():
        for key, source in found.items():
            kind = source.get_dtype() if hasattr(source, "get_dtype") else str(source.dtype)
            if "F" not in kind.upper():
                raise ValueError(
                    f"{key} is stored as {kind}, but {name} needs floating-point weights: use a bf16 copy."
                )


def _require_one_source(by_pattern: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """A parameter is stored as it is, once, or as what it is made of: of two sources one would go unread."""
    whole = [*by_pattern.get("", ())]
    others = [key for pattern, found in by_pattern.items() if pattern for key in found]
    if whole and len(whole) + len(others) > 1:
        raise ValueError(
            f"the checkpoint holds both {whole[0]} and {[*whole[1:], *others][0]} for {name}: remove the one that does "
            "not belong."
        )


def _stack(value: Tensor, converter: Any, by_pattern: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Fill a fused tensor [E, ...] from one tensor per expert and pattern."""
    rows = value.shape[1] // len(converter.source_patterns)
    wanted = (rows, *value.shape[2:])
    for place, pattern in enumerate(converter.source_patterns):
        found = by_pattern.get(pattern, {})
        if len(found) != len(value):
            raise ValueError(f"{name} needs {len(value)} experts, the checkpoint holds {len(found)} for {pattern}.")
        for expert, (key, source) in enumerate(found.items()):
            matrix = source[...]
            if tuple(matrix.shape) != wanted:
                raise ValueError(
                    f"{key} has the shape {tuple(matrix.shape)}, but {name} is made of {wanted} an expert."
                )
            value[expert, place * rows : (place + 1) * rows].copy_(matrix)


def _fill(value: Tensor, source: Tensor, name: str) -> None:
    if value.shape != source.shape:
        raise ValueError(
            f"{name} has the shape {tuple(value.shape)}, but the checkpoint's tensor has {tuple(source.shape)}."
        )
    value.copy_(source)


def _assign(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _convert(model: PreTrainedModel, mapping: list[Any], group: dict[str, Any], device: torch.device) -> None:
    """Leave one parameter to transformers."""
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(
            model,
            group,
            LoadStateDictConfig(weight_mapping=mapping, device_map={"": str(device)}, dtype=model.dtype),
        )
    wrong = [*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
    if wrong:
        raise ValueError(f"the checkpoint's tensors do not fit {type(model).__name__}: {sorted(map(str, wrong))[:3]}.")
    model.requires_grad_(False)  # transformers makes parameters that are to be trained


def checkpoint_tensors(
    model: PreTrainedModel, state: Mapping[str, Tensor], *, apart: bool = False
) -> dict[str, Tensor]:
    """A layer's parameters by module name -> tensors by checkpoint name, as `save_pretrained` would write them.

    apart: matrices by themselves wherever the architecture reads them so, though they may have come stacked.
    """
    # Of the conversions, a model remembers those that it needed to be read; without that, all are made.
    used = model.__dict__.pop(USED, None) if apart else None
    if apart and (stacked := conversions(model.__dict__.get(FLAT, ()))):
        model.__dict__[USED] = stacked
    stored = revert_weight_conversion(model, dict(state))
    if used is not None:
        model.__dict__[USED] = used
    return {_as_stored(model, name): tensor for name, tensor in stored.items()}


def layer_state(model: PreTrainedModel, index: int) -> dict[str, Tensor]:
    """The parameters and saved buffers of one layer under their full module names."""
    prefix = f"{layers_prefix(model)}{index}."
    return {prefix + name: tensor for name, tensor in decoder_layers(model)[index].state_dict().items()}


def names_outside(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Parameters outside the decoder layers that are stored as they are -> which of a checkpoint's keys holds each.

    Of a head that is tied to the embedding and stored all the same, its own key.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    groups = _by_parameter(model, get_model_conversion_mapping(model), expected, dict.fromkeys(keys))
    outside = {name: found for name, found in groups.items() if name in expected and "" in found}
    return {name: key for name, found in outside.items() for key in found[""]}


def stored_names(model: PreTrainedModel, tags: Mapping[str, Tensor]) -> dict[int, str]:
    """Under which name a checkpoint stores each matrix: tags stand in for parameters, one number for a matrix.

    A number that does not come out alone belongs to a matrix that is stored together with others: it is left out.
    """
    stored = checkpoint_tensors(model, tags, apart=True)
    return {int(tag): name for name, tag in stored.items() if tag.numel() == 1}
