"""Listening to experts: what really went through them, for every family, without changing a bit of it.

T tokens, E experts, N rows of each, D model width, F inner width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.models.families import entry_of
from moe_compress.models.modeling.edited_model import conversions
from moe_compress.models.modeling.expert_forward import (
    LISTENERS,
    Listener,
    activated,
    entering,
    experts_forward,
    gate_on_input_forward,
    run,
    running,
)
from moe_compress.models.modeling.stacked_experts import stack_experts
from moe_compress.models.modeling.unfused_experts import gate_on_input, halves, multiplied

EXPERTS_FUNCTION = "moe_compress"
UNDISPATCHED = "_moe_compress_undispatched"
# Where a model keeps the conversions by which transformers writes it, and the names of flat experts that it had.
USED, FLAT = "_weight_conversions", "_moe_compress_flat_experts"


@dataclass(frozen=True, slots=True)
class AllExperts:
    """Every expert on the same tokens: un-gated outputs, and the inputs of the down projections."""

    output_ETD: Tensor
    inner_ETF: Tensor


def tap(block: nn.Module, experts: nn.Module, listener: Listener) -> None:
    """Report every pass through the fused experts of a block to `listener`, and to all others that were added.

    Experts that transformers dispatches (all families but Llama-4) report from the experts function; Llama-4's
    block, which runs every expert on every token, is replaced by a routed forward while it is listened to.
    """
    experts.__dict__.setdefault(LISTENERS, []).append(listener)
    if gate_on_input(experts):
        block.__dict__["forward"] = functools.partial(gate_on_input_forward, block)


def untap(block: nn.Module, experts: nn.Module, listener: Listener) -> None:
    """Stop reporting to `listener`; with the last one gone, the block is as it was."""
    experts.__dict__[LISTENERS].remove(listener)
    if not experts.__dict__[LISTENERS] and gate_on_input(experts):
        block.__dict__.pop("forward", None)


# What transformers says of experts that it dispatches, unless their class says something else.
COMMON = {"is_transposed": False, "is_concatenated": True, "has_gate": True, "has_bias": False}
COMMON |= {"has_post_expert_norm": False}


def use_experts_function(model: PreTrainedModel) -> None:
    """Let every fused experts module of the model run through the function that can be tapped."""
    complete_experts(model)
    model.set_experts_implementation(EXPERTS_FUNCTION)
    for module in model.modules():
        if module.__dict__.pop(UNDISPATCHED, False):
            module.__class__ = running(type(module), experts_forward)


def complete_experts(model: PreTrainedModel) -> None:
    """Give experts that run by themselves the form of those that transformers dispatches.

    Of those that are laid out as others are (Step-3.7), what is said of the others; flat ones (DBRX) become stacks.
    """
    flat = entry_of(model.config).flat_experts
    if stack_experts(model, flat):
        model.__dict__[FLAT] = flat
        model.__dict__[USED] = [*conversions(flat), *(model.__dict__.get(USED) or ())]
    for module in model.modules():
        if hasattr(type(module), "_apply_gate") and "is_transposed" not in module.__dict__:
            module.__dict__ |= {**COMMON, UNDISPATCHED: True}


def all_experts(experts: Any, hidden_TD: Tensor) -> AllExperts:
    """Every expert on every token, with weight one; nobody who listens is told."""
    count, tokens = int(experts.num_experts), len(hidden_TD)
    number_E = torch.arange(count, device=hidden_TD.device)
    inner_RF, output_RD = run(experts, hidden_TD.repeat(count, 1), number_E.repeat_interleave(tokens), None)
    return AllExperts(output_RD.view(count, tokens, -1), inner_RF.view(count, tokens, -1))


def run_rows(experts: Any, input_END: Tensor) -> Tensor:
    """What each expert returns for its own rows [E, N, D], with weight one; nobody who listens is told."""
    count, each = input_END.shape[:2]
    number_R = torch.arange(count, device=input_END.device).repeat_interleave(each)
    return run(experts, input_END.flatten(0, 1), number_R, None)[1].view(count, each, -1)


def output_rows(experts: Any, input_RD: Tensor, expert_R: Tensor) -> Tensor:
    """What experts return for rows sorted by expert [R, D], with weight one; nobody who listens is told."""
    return run(experts, input_RD, expert_R, _ends(experts, expert_R))[1]


def inner_rows(experts: Any, input_RD: Tensor, expert_R: Tensor) -> Tensor:
    """What fused experts' down projections would be given of rows sorted by expert; nobody who listens is told."""
    return multiplied(experts, activated(experts, entering(experts, input_RD, expert_R, _ends(experts, expert_R))))


def gradients_before(experts: Any, input_RD: Tensor, expert_R: Tensor, gradient_RF: Tensor) -> dict[str, Tensor]:
    """Gradients [R, F] at what gate (where there is one) and up put out, from those at what down is given.

    input_RD: rows sorted by expert, as these were sent them. What they put out is computed anew.
    """
    with torch.no_grad():
        entered_RN = entering(experts, input_RD, expert_R, _ends(experts, expert_R))
    with torch.enable_grad():
        entered_RN.requires_grad_()
        inner_RF = activated(experts, entered_RN)
    (back_RN,) = torch.autograd.grad(inner_RF, entered_RN, gradient_RF.to(inner_RF.dtype))
    if not getattr(experts, "has_gate", True):
        return {"up": back_RN}
    gate_RF, up_RF = halves(experts, back_RN)
    return {"gate": gate_RF, "up": up_RF}


def _ends(experts: Any, expert_R: Tensor) -> Tensor:
    """Where the rows of each expert end."""
    return torch.bincount(expert_R, minlength=int(experts.num_experts)).cumsum(0).to(torch.int32)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
