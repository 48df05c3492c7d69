"""Every Mixture-of-Experts architecture of the installed transformers: works, works with limits, or is refused.

Each is built small from its config's defaults, text is run through it layer by layer and by its own forward, and each
recipe is tried on a skeleton. Nothing is known of it beforehand, so that the lists are made of what the code does.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.data.windows import Windows
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES, Family
from moe_compress.models.modeling import edited_model
from moe_compress.models.shape import model_shape

# What every list by layer and every count of layers is cut to, and of the towers beside a language model.
LAYERS, TOWER_LAYERS = 4, 1
TOKENS = 12
Cut = Callable[[Mapping[str, Any]], dict[str, Any]]
# Of a model type, a small config of it; of that and its skeleton, the recipes that are refused.
Small = Callable[[str], PreTrainedConfig]
Tried = Callable[[PreTrainedConfig, PreTrainedModel], tuple[str, ...]]


@dataclass(frozen=True)
class Found:
    """What is known of an architecture: why it is refused, or was not tried, or else the recipes that are refused."""

    refused: str = ""
    untried: str = ""
    limits: tuple[str, ...] = ()


def moe_types(also: Collection[str] = ()) -> Iterator[str]:
    """The architectures whose default config counts several experts, in itself or in a part of it, and some others."""
    for model_type in sorted(name for name in CONFIG_MAPPING.keys() if not name.startswith(edited_model.PREFIX)):  # noqa: SIM118
        try:
            values = default_values(model_type)
        except Exception:  # whatever its defaults lack: then nothing is published under it
            continue
        if _counts_experts(values) or model_type in also:
            yield model_type


def default_values(model_type: str) -> dict[str, Any]:
    """The config.json values of an architecture's defaults."""
    values: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return values


def _counts_experts(values: Mapping[str, Any]) -> bool:
    nested = (each for each in values.values() if isinstance(each, Mapping))
    own = (value for key, value in values.items() if "num_experts" in str(key) or str(key).endswith("_experts"))
    return any(isinstance(value, int) and value > 1 for value in own) or any(map(_counts_experts, nested))


def small_values(values: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """config.json values with few and narrow layers; `cut` are the sizes of a language model."""
    text = hf.text_values(values)
    count = next((text[key] for key in ("num_hidden_layers", "num_layers") if text.get(key)), LAYERS)
    lists: dict[str, Any] = {k: _some(v) for k, v in text.items() if isinstance(v, list) and len(v) == count}
    sizes = cut(text)
    if isinstance(by_layer := text.get("per_layer_config"), Mapping):
        lists["per_layer_config"] = {k: v for k, v in by_layer.items() if int(k) < LAYERS}
    if isinstance(rope := text.get("rope_parameters"), Mapping) and "mrope_section" in rope:
        lists["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    if not hf.is_wrapper(CONFIG_MAPPING[values["model_type"]]()):
        return {**text, **lists, **sizes}
    width = text.get("hidden_size")
    small = {k: _tower(v, width, sizes["hidden_size"]) if isinstance(v, Mapping) else v for k, v in values.items()}
    return hf.with_text_values(small, {**text, **lists, **sizes})


def _tower(values: Mapping[str, Any], width: Any, small: int) -> dict[str, Any]:
    """Another tower with few layers, which gives as many numbers as the small language model takes."""
    deep = ("num_hidden_layers", "depth", "layers", "encoder_layers")
    shallow = {k: TOWER_LAYERS for k in deep if isinstance(values.get(k), int)}
    depth = next((v for k, v in values.items() if k in shallow), None)
    lists = {k: v[:TOWER_LAYERS] for k, v in values.items() if isinstance(v, list) and len(v) == depth}
    return {
        **values,
        **lists,
        **{k: small for k, v in values.items() if v == width and "hidden" in k and k != "hidden_size"},
        **shallow,
    }


def _some(by_layer: list[Any]) -> list[Any]:
    """Entries of a list by layer: one of each kind in turn, in the order in which they come."""
    kinds: list[Any] = []
    for each in by_layer:
        kinds += [each] if each not in kinds else []
    return (kinds[:LAYERS] * LAYERS)[:LAYERS]


def runs_text(config: PreTrainedConfig) -> str:
    """Why text does not run through the language model layer by layer as through its own forward; empty if it does."""
    model = hf.skeleton(config, torch.float32)
    _fill(model)
    generator = torch.Generator().manual_seed(0)
    ids_NS = torch.randint(3, 90, (2, TOKENS), generator=generator)
    number_N = torch.arange(2)
    document_NS, mask_NS = number_N[:, None].expand_as(ids_NS), torch.ones_like(ids_NS, dtype=torch.bool)
    windows = Windows(ids_NS, mask_NS, document_NS, torch.zeros_like(number_N), ("text",), "random", {})
    layers = ResidentLayers(model)
    layers.device = torch.device("cpu")
    try:
        with torch.no_grad():
            whole_NSV = model(ids_NS, use_cache=False).logits
        _, hidden_NSD = forward_layers(layers, windows)
        apart_NSV = hf.head(model, hidden_NSD.flatten(0, 1)).view_as(whole_NSV)
    except Exception as error:  # whatever its modules raise
        return f"text does not run through its layers one by one ({_sentence(error)})"
    distance = float((whole_NSV - apart_NSV).norm() / whole_NSV.norm())
    return (
        "" if distance < 1e-5 else f"its layers one by one give other logits than its own forward (by {distance:.0e})"
    )


def _fill(model: PreTrainedModel) -> None:
    """Small random weights for all that text passes through."""
    generator, read = torch.Generator().manual_seed(1), hf.text_prefixes(model)
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta and f"{prefix}.{name}".lstrip(".").startswith(read):
                    noise = torch.randn(tensor.shape, generator=generator) * max(tensor.shape[-1:] or [1]) ** -0.5
                    value = noise if tensor.dim() > 1 else 1 + 0.1 * noise
                    table[name] = nn.Parameter(value, requires_grad=False) if table is module._parameters else value
    model.tie_weights()


def _sentence(error: Exception) -> str:
    return (" ".join(str(error).split()[:25]) or type(error).__name__).rstrip(".")


def architecture(model_type: str, attempts: Sequence[Small], tried: Tried) -> Found:
    """What works with an architecture: with the first small config that does, or why not with the last."""
    entry = FAMILIES.get(model_type, Family(model_type))
    found = Found(refused=entry.refused or entry.no_expert_edits or "")
    for small in () if found.refused else attempts:
        try:
            config = small(model_type)
        except Exception as error:  # whatever its checks say
            found = Found(untried=_sentence(error))
            continue
        try:
            model = hf.skeleton(config, torch.bfloat16)
            model_shape(model)
            why = runs_text(config)
            found = Found(refused=why) if why else Found(limits=tried(config, model))
        except ValueError as error:
            found = Found(refused=_sentence(error))
        if not (found.refused or found.untried):
            break
    return found


def lists(attempts: Callable[[str], Sequence[Small]], tried: Tried, also: Collection[str]) -> str:
    """The three lists as a part of a page."""
    transformers.utils.logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")
    found = {model_type: architecture(model_type, attempts(model_type), tried) for model_type in moe_types(also)}
    works = [f"`{name}`" for name, each in found.items() if not (each.refused or each.untried or each.limits)]
    limited = [f"- `{name}`: not {', '.join(each.limits)}." for name, each in found.items() if each.limits]
    refused = [f"- `{name}`: {each.refused}." for name, each in found.items() if each.refused]
    untried = [f"- `{name}`: {each.untried}." for name, each in found.items() if each.untried]
    version = ".".join(transformers.__version__.split(".")[:2])
    return "\n".join(
        [
            f"## Every Mixture-of-Experts architecture of transformers {version}",
            "",
            "Built small from its defaults, with random weights: text is run through it, and every recipe of the table",
            "is tried.",
            "",
            f"**Works** ({len(works)}): {', '.join(works)}.",
            "",
            f"**Works with limits** ({len(limited)}):",
            "",
            *limited,
            "",
            f"**Refused** ({len(refused)}):",
            "",
            *refused,
            "",
            f"**Not tried** ({len(untried)}), for no small model can be made of their defaults:",
            "",
            *untried,
        ]
    )
