"""Experts whose matrices lie in one flat matrix a projection, [E * F, D], held as stacks like those of all others.

Checkpoints keep the flat matrices, under their names (edited_model.py says how). Shipped inside edited checkpoints, so
it needs torch alone. E experts, D model width, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .expert_forward import experts_forward

ACTIVATIONS = ("act_fn", "activation_fn")


class StackedExperts(nn.Module):
    """What a module of flat experts computes, from stacks: gate and up [E, 2F, D], down [E, D, F]."""

    is_transposed, is_concatenated, has_gate, has_bias, has_post_expert_norm = False, True, True, False, False
    forward = experts_forward

    def __init__(self, experts: Any, names: Sequence[str]) -> None:
        super().__init__()
        gate, up, down = (experts.get_parameter(name) for name in names)
        holder = experts.get_submodule(names[0].rpartition(".")[0])
        self.act_fn = next(getattr(holder, name) for name in ACTIVATIONS if hasattr(holder, name))
        self.num_experts = int(experts.num_experts)
        both_END = stacked([gate.detach(), up.detach()], self.num_experts)
        self.gate_up_proj = nn.Parameter(both_END, requires_grad=gate.requires_grad)
        self.down_proj = nn.Parameter(transposed(down.detach(), self.num_experts), requires_grad=down.requires_grad)

    def _apply_gate(self, both_RN: Tensor) -> Tensor:
        gate_RF, up_RF = both_RN.chunk(2, dim=-1)
        gated_RF: Tensor = self.act_fn(gate_RF) * up_RF
        return gated_RF


def stacked(flat: Sequence[Tensor], experts: int) -> Tensor:
    """Flat matrices [E * F, D] beside each other, expert by expert, [E, N * F, D]."""
    return torch.cat([each.unflatten(0, (experts, -1)) for each in flat], dim=1)


def transposed(flat: Tensor, experts: int) -> Tensor:
    """A flat matrix [E * F, D] as stack of its transpose [E, D, F]."""
    return flat.unflatten(0, (experts, -1)).transpose(1, 2).contiguous()


def stack_experts(model: nn.Module, flat: Sequence[str]) -> bool:
    """Hold flat experts as stacks in all blocks of a model; whether there were any.

    flat: the names of gate, up and down within a block.
    """
    blocks = [block for block in model.modules() if flat and _holds(block, flat[0])]
    for block in blocks:
        child = flat[0].partition(".")[0]
        names = [name.partition(".")[2] for name in flat]
        block.register_module(child, StackedExperts(block.get_submodule(child), names))
    return bool(blocks)


def _holds(block: nn.Module, path: str) -> bool:
    child, _, rest = path.partition(".")
    if not rest:
        return child in block._parameters
    inner = block._modules.get(child)
    return inner is not None and _holds(inner, rest)
