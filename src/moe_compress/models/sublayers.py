"""What a decoder layer consists of, by name: its MoE block, its attention, and the norms that go with each."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.modeling.edit_layer import ZeroSublayer
from moe_compress.models.moe import moe_views

# Norms around the MoE block, in the order in which they tell: the last is the block's own only in pre-norm layers.
MOE_NORMS = (
    ("pre_mlp_layernorm", "post_mlp_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_feedforward_layernorm",),
    ("pre_ff_layernorm",),
    ("ffn_norm",),
    ("post_attention_layernorm",),
)
ATTENTION_NORMS = ("input_layernorm", "operator_norm", "post_attention_layernorm")
ATTENTION = ("self_attn", "self_attention", "attention")
# MLPs that run beside the block, on the same input (Granite), and factors of the stream past it (MiniMax).
BESIDE = ("shared_mlp",)
# What layers and mixers call their kind, and the kinds that are no attention over all tokens.
KINDS = ("layer_type", "block_type", "attention_type")
LINEAR_MIXERS = ("linear_attention", "conv", "mamba")
FACTORS = {"moe": ("mlp_alpha_factor",), "attention": ("attn_alpha_factor",)}


def sublayer_names(layer: nn.Module, family: Family, moe: dict[str, str]) -> dict[str, Any]:
    """`moe` (block, experts, router) together with the names of everything that leaves with a sub-layer."""
    children = {name for name, child in layer.named_children() if child is not None}
    moe_norms = next((norms for norms in MOE_NORMS if children.issuperset(norms)), ())
    return {
        **moe,
        "outputs": family.block_outputs,
        "beside": [name for name in BESIDE if name in children],
        "moe_norms": list(moe_norms),
        "attention": next((name for name in ATTENTION if name in children), ATTENTION[0]),
        "attention_norms": [n for n in ATTENTION_NORMS if n in children and n not in moe_norms],
        **{f"{part}_factors": [f for f in names if hasattr(layer, f)] for part, names in FACTORS.items()},
    }


def is_whole_layer(layer: nn.Module, names: dict[str, Any]) -> bool:
    """Whether the MoE block is all that the layer does (Nemotron-H)."""
    return not names["moe_norms"] and not any(child in ATTENTION for child, _ in layer.named_children())


def block_names(model: PreTrainedModel) -> dict[str, Any]:
    """Where, inside a decoder layer, the MoE block, its experts, its router, the attention and their norms are."""
    index, view = next(iter(moe_views(model).items()))
    return sublayer_names(hf.decoder_layers(model)[index], family_of(model.config), view.names)


def attention_layers(model: PreTrainedModel) -> list[int]:
    """The layers whose token mixer is attention."""
    name, layers = block_names(model)["attention"], hf.decoder_layers(model)
    children = [dict(layer.named_children()).get(name) for layer in layers]
    return [
        index
        for index, (layer, child) in enumerate(zip(layers, children, strict=True))
        if hasattr(child, "layer_idx") and not isinstance(child, ZeroSublayer) and not _is_linear(layer, child)
    ]


def lost_part(layer: nn.Module) -> bool:
    """Whether the layer has lost its MoE block or its attention."""
    return any(isinstance(child, ZeroSublayer) for child in layer.children())


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


def _is_linear(layer: nn.Module, mixer: nn.Module | None) -> bool:
    """Whether layer or mixer says of itself that it is no attention over all tokens."""
    return any(getattr(module, key, None) in LINEAR_MIXERS for module in (layer, mixer) for key in KINDS)
