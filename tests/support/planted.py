"""Tiny readers with planted copies of experts."""

from __future__ import annotations

import torch

from moe_compress.analysis.layer_info import view_of
from moe_compress.models.moe import permute_neurons
from support import readers, tiny

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")
PROMPTS = readers.LINES * 4

LAYER = 2


def reader(family: str, **overrides):
    return tiny.make(family, vocab_size=readers.VOCAB, **overrides)


@torch.no_grad()
def plant(model, layer: int, source: int, copy: int, permuted: bool) -> None:
    """Let one expert hold the weights of another, its neurons perhaps in another order; its router row stays."""
    view = view_of(model, layer)
    for parameter in view.experts.parameters():
        parameter[copy] = parameter[source]
    if permuted:
        order_EF = torch.arange(tiny.INNER).repeat(view.num_experts, 1)
        order_EF[copy] = torch.randperm(tiny.INNER, generator=torch.Generator().manual_seed(copy))
        permute_neurons(view, order_EF)
