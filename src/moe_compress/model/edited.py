"""Models whose layers differ: rebuilt by replaying edits on the original architecture.

This file needs torch and transformers alone. It is shipped, word for word, inside every edited checkpoint, so
that `trust_remote_code=True` loads it where moe-compress is not installed; inside moe-compress the same code
applies edits to real and to meta tensors alike. An edit is a JSON object, for example
`{"edit": "keep_experts", "layer": 3, "experts": [0, 2, 5]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

PREFIX = "moe_compress_"


def keep_experts(layer: nn.Module, names: Mapping[str, str], *, experts: Sequence[int]) -> None:
    """Cut one MoE block down to `experts`, in that order: weights, router rows and biases together."""
    fused: Any = layer.get_submodule(names["experts"])
    router = layer.get_submodule(names["router"])
    count = fused.down_proj.shape[0]
    _slice(fused, count, experts, dims=(0,))
    _slice(layer.get_submodule(names["block"]), count, experts, dims=(0,), flat_only=True)
    for module in router.modules():
        _slice(module, count, experts, dims=(0, 1))


def _slice(module: nn.Module, count: int, kept: Sequence[int], dims: tuple[int, ...], flat_only: bool = False) -> None:
    """Select along the first of `dims` that has `count` entries, in every tensor that the module itself owns."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is None or (flat_only and tensor.dim() != 1):
                continue
            dim = next((d for d in dims if d < tensor.dim() and tensor.shape[d] == count), None)
            if dim is None:
                continue
            index = torch.tensor(kept, device=tensor.device)
            part = tensor.detach().index_select(dim, index)
            table[name] = nn.Parameter(part, requires_grad=False) if table is module._parameters else part
    for attribute in ("num_experts", "n_routed_experts", "num_local_experts", "out_features"):
        if module.__dict__.get(attribute) == count:
            setattr(module, attribute, len(kept))


EDITS: dict[str, Callable[..., None]] = {"keep_experts": keep_experts}


def apply(layer: nn.Module, names: Mapping[str, str], edit: Mapping[str, Any]) -> None:
    """Carry out one edit on one decoder layer."""
    arguments = {key: value for key, value in edit.items() if key not in ("edit", "layer")}
    EDITS[edit["edit"]](layer, names, **arguments)


def replay(model: Any, manifest: Mapping[str, Any]) -> None:
    """Carry out all edits of a manifest, in order, on a whole model."""
    base = model.base_model if hasattr(model.base_model, "layers") else model.model
    for edit in manifest["edits"]:
        apply(base.layers[edit["layer"]], manifest["moe"], edit)


def edited_classes(config_class: Any, model_class: Any) -> tuple[type, type]:
    """The config and model classes of an edited checkpoint of the given architecture."""
    base_type = config_class.model_type

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        replay(self, config.moe_compress)

    config_name = f"Edited{config_class.__name__}"
    edited_config = type(config_name, (config_class,), {"model_type": PREFIX + base_type, "__module__": __name__})
    # transformers answers these two by searching the source of the class's module, which here is this file.
    edited_model = type(
        f"Edited{model_class.__name__}",
        (model_class,),
        {
            "__init__": __init__,
            "config_class": edited_config,
            "_can_set_attn_implementation": classmethod(lambda _: model_class._can_set_attn_implementation()),
            "_can_set_experts_implementation": classmethod(lambda _: model_class._can_set_experts_implementation()),
            "__module__": __name__,
        },
    )
    mapping = get_checkpoint_conversion_mapping(base_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(PREFIX + base_type, mapping, overwrite=True)
    return edited_config, edited_model
