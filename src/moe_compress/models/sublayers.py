"""What a decoder layer consists of, by name: its MoE block, its attention, and the norms that go with each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.modeling.edit_layer import ZeroSublayer
from moe_compress.models.moe import moe_views

# Where layers and mixers say of what kind they are.
KINDS = ("layer_type", "block_type", "attention_type")


def within(name: str, place: str) -> bool:
    """Whether a dotted name is that of a module or of something inside it; nothing is inside a place without name."""
    return bool(place) and (name == place or name.startswith(f"{place}."))


def sublayer_names(layer: nn.Module, family: Family, moe: dict[str, str]) -> dict[str, Any]:
    """`moe` (block, experts, router) together with the names of everything that leaves with a sub-layer."""
    children = {name for name, _ in layer.named_modules()}
    moe_norms = next((norms for norms in family.moe_norms if children.issuperset(norms)), ())
    factors = {"moe": family.moe_factors, "attention": family.attention_factors}
    return {
        **moe,
        "outputs": family.block_outputs,
        **({"attention_outputs": family.attention_outputs} if family.attention_outputs != 2 else {}),
        "beside": [name for name in family.beside if name in children],
        "moe_norms": list(moe_norms),
        "attention": next((name for name in family.attention if name in children), family.attention[0]),
        "attention_norms": [n for n in family.attention_norms if n in children and n not in moe_norms],
        **{f"{part}_factors": [f for f in names if hasattr(layer, f)] for part, names in factors.items()},
    }


def is_whole_layer(layer: nn.Module, family: Family, names: dict[str, Any]) -> bool:
    """Whether the MoE block is all that the layer does (Nemotron-H)."""
    return not names["moe_norms"] and not any(name in family.attention for name, _ in layer.named_modules())


def block_names(model: PreTrainedModel) -> dict[str, Any]:
    """Where, inside a decoder layer, the MoE block, its experts, its router, the attention and their norms are."""
    views = moe_views(model)
    if not views:
        raise ValueError(f"this {model.config.model_type} model has no layer whose experts a router chooses.")
    index, view = next(iter(views.items()))
    names = sublayer_names(hf.decoder_layers(model)[index], family_of(model.config), view.names)
    return {**names, "spare_rows": view.spare_rows} if view.spare_rows else names


def attention_layers(model: PreTrainedModel) -> list[int]:
    """The layers whose token mixer is attention."""
    name, layers = block_names(model)["attention"], hf.decoder_layers(model)
    kinds = family_of(model.config).recurrent_kinds
    children = [dict(layer.named_modules()).get(name) for layer in layers]
    return [
        index
        for index, (layer, child) in enumerate(zip(layers, children, strict=True))
        if hasattr(child, "layer_idx") and not isinstance(child, ZeroSublayer) and not says_kind(layer, child, kinds)
    ]


def lost_part(layer: nn.Module) -> bool:
    """Whether the layer has lost its MoE block or its attention."""
    return any(isinstance(module, ZeroSublayer) for module in layer.modules())


def mixing_layers(model: PreTrainedModel) -> list[int]:
    """The layers in which tokens attend to others, attention of its own kind of layer (Nemotron-H) included."""
    layers = hf.decoder_layers(model)
    kinds = [getattr(layer, "block_type", None) for layer in layers]
    whole = [index for index, kind in enumerate(kinds) if kind in ("attention", "full_attention")]
    return sorted({*attention_layers(model), *whole})


def require_other_attention(model: PreTrainedModel, layer: int) -> None:
    """Raise ValueError if no layer but this one has attention: the cache that generation needs counts by it."""
    if mixing_layers(model) == [layer]:
        raise ValueError(f"layer {layer} is the only one left with attention, which has to stay.")


def says_kind(layer: nn.Module, mixer: nn.Module | None, kinds: Sequence[str]) -> bool:
    """Whether layer or mixer says that it is of one of these kinds."""
    return any(getattr(module, key, None) in kinds for module in (layer, mixer) for key in KINDS)
