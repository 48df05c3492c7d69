"""What a decoder layer consists of, by name: its MoE block, its attention, and the norms that go with each."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_compress.model.families import Family

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
