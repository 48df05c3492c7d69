"""Models whose layers differ: rebuilt by replaying edits on the original architecture.

This file and edit_layer.py need torch and transformers alone. They are shipped, word for word, inside every
edited checkpoint, so that `trust_remote_code=True` loads it where moe-compress is not installed; inside
moe-compress the same code applies edits to real and to meta tensors alike. An edit is a JSON object, for example
`{"edit": "keep_experts", "layer": 3, "experts": [0, 2, 5]}`; edits follow each other, so each names layers and
experts as they are numbered when it is reached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .edit_layer import (
    drop_layer,
    factor_experts,
    keep_channels,
    keep_experts,
    layers_name,
    merge_experts,
    pack_matrices,
    round_activations,
    set_top_k,
    skip_experts,
    skip_sublayer,
)
from .stacked_experts import stack_experts, stacked, transposed

PREFIX = "moe_compress_"
LISTS = ("layer_types", "layers_block_type", "layers_num_experts")

# --- whole models -------------------------------------------------------------------------------------------

EDITS: dict[str, Callable[..., None]] = {
    edit.__name__: edit
    for edit in (
        keep_experts,
        merge_experts,
        keep_channels,
        factor_experts,
        pack_matrices,
        round_activations,
        set_top_k,
        skip_experts,
        skip_sublayer,
    )
}


def apply(
    stack: Any, names: Mapping[str, Any], edit: Mapping[str, Any], arrays: Mapping[str, Tensor] | None = None
) -> None:
    """Carry out one edit on the decoder layers of `stack`; `arrays` are the tensors it brings along."""
    arguments = {key: value for key, value in edit.items() if key not in ("edit", "layer")}
    if edit["edit"] == "drop_layer":
        drop_layer(stack, edit["layer"])
    else:
        layers = getattr(stack, layers_name(stack))
        EDITS[edit["edit"]](layers[edit["layer"]], names, **arguments, **(arrays or {}))


def replay(model: Any, manifest: Mapping[str, Any]) -> None:
    """Carry out all edits of a manifest, in order, on a whole model."""
    stack = model.base_model if layers_name(model.base_model) else model.model
    for edit in manifest["edits"]:
        apply(stack, manifest["moe"], edit)


@contextlib.contextmanager
def config_values(config: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """The config with other values, inside the block."""
    before = {key: getattr(config, key) for key in values}
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def _is_derived(config_class: Any, name: str) -> bool:
    return isinstance(getattr(config_class, name, None), property)


def _listed(config_class: Any, name: str) -> property:
    """A list by layer that the config derives from a period: once layers are gone, what is left of it."""
    derived = getattr(config_class, name).fget

    def listed(config: Any) -> Any:
        left = getattr(config, "moe_compress", {}).get("lists", {}).get(name)
        return left if left is not None and len(left) == config.num_hidden_layers else derived(config)

    return property(listed)


def edited_classes(config_class: Any, model_class: Any, flat: Sequence[str] = ()) -> tuple[type, type]:
    """The config and model classes of an edited checkpoint of the given architecture.

    flat: the names of its experts' flat matrices, where it has such (`stacked_experts.py`).
    """
    base_type = config_class.model_type

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # The model is built as it was and then edited; from there on the config counts the layers that are left.
        with config_values(config, config.moe_compress.get("original", {})):
            model_class.__init__(self, config, *args, **kwargs)
        stack_experts(self, flat)
        replay(self, config.moe_compress)

    body: dict[str, Any] = {"model_type": PREFIX + base_type, "__module__": __name__}
    body |= {name: _listed(config_class, name) for name in LISTS if _is_derived(config_class, name)}
    edited_config = type(f"Edited{config_class.__name__}", (config_class,), body)
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
    mapping = [*conversions(flat), *(get_checkpoint_conversion_mapping(base_type) or [])]
    if mapping:
        register_checkpoint_conversion_mapping(PREFIX + base_type, mapping, overwrite=True)
    return edited_config, edited_model


# --- flat experts -------------------------------------------------------------------------------------------


def conversions(flat: Sequence[str]) -> list[WeightConverter]:
    """How transformers makes stacks of the flat matrices of a checkpoint, and these again of stacks; none for none."""
    if not flat:
        return []
    child, (gate, up, down) = flat[0].partition(".")[0], flat
    return [
        WeightConverter([gate, up], f"{child}.gate_up_proj", [Stack()]),
        WeightConverter(down, f"{child}.down_proj", [Stack()]),
    ]


class Stack(ConversionOps):
    """Flat matrices to a stack; one alone is transposed. How many experts there are, the model says."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The stack, by the name of its parameter."""
        (target,) = target_patterns
        experts = len(kwargs["model"].get_parameter(kwargs["full_layer_name"]))
        flat = [_alone(input_dict[pattern]) for pattern in source_patterns]
        return {target: stacked(flat, experts) if len(flat) > 1 else transposed(flat[0], experts)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Back."""
        return Flatten()


class Flatten(ConversionOps):
    """A stack to flat matrices."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The flat matrices, by their names."""
        (stack_EOI,) = map(_alone, input_dict.values())
        parts = stack_EOI.chunk(len(target_patterns), 1) if len(target_patterns) > 1 else [stack_EOI.transpose(1, 2)]
        return {name: part.flatten(0, 1).contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Back."""
        return Stack()


def _alone(found: Any) -> Tensor:
    """A tensor, or the only one of a list."""
    (tensor,) = found if isinstance(found, list) else [found]
    return tensor
