"""Four different sizes of a model, from its skeleton alone: stored, on disk, touched per token, computed per token.

Two floating-point operations a multiply-add; attention over the full T x T square, not the causal half; the head on
every token; recurrent scans and convolutions are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.model import hf
from moe_compress.model.edited_layers import Nothing
from moe_compress.model.families import family_of
from moe_compress.model.moe import moe_views
from moe_compress.model.packed import PARAMETERS as PACKED
from moe_compress.model.rerouting import NOVICES

Active = tuple[float | None, int | None]
ATTENTION_CHILDREN = ("self_attn", "self_attention", "attention", "attn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """parameters: stored; bytes: on disk; touched: distinct parameters one token uses; flops_per_token at `context`."""

    parameters: int
    bytes: int
    touched: int
    flops_per_token: int
    context: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def sizes(model: PreTrainedModel, context: int, stored: torch.dtype, scale_bytes: float | None = None) -> Sizes:
    """Count a model or a skeleton; `context` tokens attend to each other, `stored` is the dtype on disk.

    scale_bytes: what a scale of packed weights takes there, if not that.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    active_experts = _active_experts(model)
    empty = torch.empty(0, dtype=stored)
    top_k = float(getattr(model.config, family_of(model.config).top_k_key))
    total = size = touched = multiplied = 0
    for _, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (tied and module is head):
                continue
            active = _active_fraction(module, parameter, active_experts, top_k)
            each = (parameter if name in PACKED else empty).element_size()
            size += round(parameter.numel() * (scale_bytes if scale_bytes and name == PACKED[1] else each))
            if name in PACKED:  # a packed matrix counts as the weights that it holds
                parameter = module.weight_like if name == PACKED[0] else parameter[:0]
            total += parameter.numel()
            if module is embedding or name == NOVICES:  # a token looks up a row, or one constant
                touched += parameter.shape[1]
                continue
            used = round(parameter.numel() * active)
            touched += used
            multiplied += used if parameter.dim() > 1 and not name.endswith("bias") else 0
    if tied and isinstance(embedding, nn.Embedding):
        touched += embedding.weight.numel() - embedding.weight.shape[1]
        multiplied += embedding.weight.numel()
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    size += buffers * empty.element_size()
    flops = 2 * multiplied + attention_flops(model, context)
    return Sizes(parameters=total, bytes=size, touched=touched, flops_per_token=flops, context=context)


def _active_experts(model: PreTrainedModel) -> dict[int, Active]:
    """By module: experts that a token uses on average, and of how many (None: as many as the tensors have rows)."""
    found: dict[int, Active] = {}
    for view in moe_views(model).values():
        found[id(view.experts)] = view.active, None
        if view.one_by_one:
            found |= {id(module): (view.active, view.num_experts) for module in view.experts.separate.modules()}
    return found


def _active_fraction(
    module: nn.Module,
    parameter: torch.Tensor,
    active_experts: Mapping[int, tuple[float | None, int | None]],
    top_k: float,
) -> float:
    """The share of an experts tensor that one token uses on average; 1 for everything else."""
    active, count = active_experts.get(id(module), (top_k, None))
    if count is not None:
        return 1.0 if active is None else min(active, count) / count
    if active is None or parameter.dim() < 2 or type(module).__name__.endswith(("Router", "Gate", "Gating")):
        return 1.0
    is_experts = hasattr(module, "_apply_gate") or (parameter.dim() == 3 and "xpert" in type(module).__name__)
    return min(active, parameter.shape[0]) / parameter.shape[0] if is_experts else 1.0


def attention_flops(model: PreTrainedModel, context: int) -> int:
    """Scores and weighted values of all attention layers, per token."""
    config = model.config
    heads = int(getattr(config, "num_attention_heads", 0))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    if getattr(config, "kv_lora_rank", None):
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        query = value = head_dim
    layers = sum(_has_attention(layer) for layer in hf.decoder_layers(model))
    return 2 * context * heads * (query + value) * layers


def _has_attention(layer: nn.Module) -> bool:
    return any(
        (name in ATTENTION_CHILDREN and not isinstance(child, Nothing))
        or (name == "mixer" and "Attention" in type(child).__name__)
        for name, child in layer.named_children()
    )
