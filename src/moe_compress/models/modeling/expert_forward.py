"""What an experts block computes, for every family, and what is reported of it to whoever listens.

Does what transformers' grouped products do, in the same order, to the last bit. Shipped inside edited checkpoints,
whose experts may be held one by one. T tokens, K experts per token, E experts, D model width, F inner width,
R <= T*K routed (token, expert) pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from .activation_rounding import ROUNDS, rounded, rounding_of
from .factored_experts import entered, run_shared, run_shared_by_one_token, shares_parts
from .unfused_experts import (
    CHILDREN,
    UNFUSED,
    ExpertMatrix,
    biases,
    expert_count,
    gate_on_input,
    is_separate,
    multiplied,
    run_one_token,
    run_separate,
    stacks,
)

LISTENERS = "_moe_compress_listeners"


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """What really went through the experts of one MoE block. R = routed (token, expert) pairs, by expert.

    token_R, expert_R: which token went to which expert; input_RD: what the expert saw; inner_RF: the input of
    its down projection; output_RD: its output before the gate weight; gate_R: the gate weight applied;
    routed_TD: the weighted sum that the block adds.
    """

    token_R: Tensor
    expert_R: Tensor
    input_RD: Tensor
    inner_RF: Tensor
    output_RD: Tensor
    gate_R: Tensor
    routed_TD: Tensor


Listener = Callable[[RoutedRows], None]


def _report(experts: nn.Module, *rows: Tensor) -> None:
    listeners = experts.__dict__.get(LISTENERS)
    if listeners:
        reported = RoutedRows(*rows)
        for listener in tuple(listeners):
            listener(reported)


def gate_on_input_forward(block: Any, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Llama-4's MoE block on routed tokens only; the router's weight scales the expert's input.

    `output_RD` is what the expert adds divided by its gate weight, so that gate * output is its contribution.
    """
    hidden_TD = hidden_BSD.reshape(-1, block.hidden_dim)
    _, logits_TE = block.router(hidden_TD)
    value_TK, index_TK = torch.topk(logits_TE, block.top_k, dim=1)
    expert_R, order = torch.sort(index_TK.reshape(-1))
    token_R = order // block.top_k
    gate_R = torch.sigmoid(value_TK.float()).to(hidden_TD.dtype).reshape(-1)[order]
    experts = block.experts
    ends_E = torch.bincount(expert_R, minlength=experts.num_experts).cumsum(0).to(torch.int32)
    input_RD = sent(experts, hidden_TD[token_R] * gate_R.unsqueeze(-1))
    if _meets_once(experts):
        entered_by = entered(experts, sent(experts, hidden_TD), block.top_k)
        given = {name: rows_TX[token_R] * gate_R.unsqueeze(-1) for name, rows_TX in entered_by.items()}
        summed = functools.partial(_summed, token_R=token_R, tokens=len(hidden_TD))
        added_TD = run_shared(experts, input_RD, ends_E.diff(prepend=ends_E.new_zeros(1)).tolist(), given, summed)
        return block.shared_expert(hidden_TD) + (0 if added_TD is None else added_TD), logits_TE
    inner_RF, added_RD = run(experts, input_RD, expert_R, ends_E)
    routed_TD = torch.zeros_like(hidden_TD).index_add_(0, token_R, added_RD)
    output_RD = added_RD / gate_R.unsqueeze(-1)
    _report(experts, token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD)
    return block.shared_expert(hidden_TD) + routed_TD, logits_TE


def _summed(rows_RX: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """Rows added up by token."""
    return rows_RX.new_zeros(tokens, rows_RX.shape[-1]).index_add_(0, token_R, rows_RX)


def _meets_once(experts: nn.Module) -> bool:
    """Whether tokens meet what experts share once; whoever listens is told of rows, each of which does then."""
    return shares_parts(experts) and not experts.__dict__.get(LISTENERS)


def sent(experts: nn.Module, hidden_TD: Tensor) -> Tensor:
    """Tokens as experts get them."""
    return rounded(hidden_TD) if rounding_of(experts) else hidden_TD


def run(experts: Any, input_RD: Tensor, expert_R: Tensor, ends_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert: the inputs of the down projections [R, F] and the outputs before the gate [R, D].

    ends_E: where the rows of each expert end; None: all have equally many.
    """
    if is_separate(experts):
        return run_separate(experts, input_RD, torch.bincount(expert_R, minlength=expert_count(experts)).tolist())
    inner_RF = multiplied(experts, activated(experts, entering(experts, input_RD, expert_R, ends_E)))
    output_RD = _product(experts, "down_proj", inner_RF, expert_R, ends_E)
    normed = getattr(experts, "has_post_expert_norm", False)
    return inner_RF, experts.post_expert_norm(output_RD) if normed else output_RD


def entering(experts: Any, input_RD: Tensor, expert_R: Tensor, ends_E: Tensor | None) -> Tensor:
    """What fused experts' gate and up make of rows sorted by expert [R, 2F], as they lie together; of up alone [R, F].

    ends_E: see `run`.
    """
    gated = getattr(experts, "has_gate", True)
    return _product(experts, "gate_up_proj" if gated else "up_proj", input_RD, expert_R, ends_E)


def activated(experts: Any, entered_RN: Tensor) -> Tensor:
    """What comes of that once it is activated, [R, F]."""
    if gate_on_input(experts):
        gate_RF, up_RF = entered_RN.chunk(2, dim=-1)
        return up_RF * experts.act_fn(gate_RF)
    return experts._apply_gate(entered_RN) if experts.has_gate else experts.act_fn(entered_RN)


def _product(experts: Any, name: str, x_RI: Tensor, expert_R: Tensor, ends_E: Tensor | None) -> Tensor:
    """Rows sorted by expert times its matrix of that name, and its bias."""
    grouped = _looped_linear if x_RI.dtype == torch.float64 else _grouped_linear
    multiply = _batched_linear if ends_E is None else functools.partial(grouped, offs=ends_E)
    bias_EO = getattr(experts, f"{name}_bias") if getattr(experts, "has_bias", False) else None
    bias_RO = None if bias_EO is None else bias_EO[expert_R]
    transposed = getattr(experts, "is_transposed", True)
    return multiply(x_RI, getattr(experts, name), bias=bias_RO, is_transposed=transposed)


def _looped_linear(
    x_RI: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None = None, *, is_transposed: bool
) -> Tensor:
    """A grouped product expert by expert, in double precision, of which torch has none."""
    weight_EIO = weight if is_transposed else weight.transpose(1, 2)
    parts = zip(x_RI.tensor_split(offs[:-1].tolist()), weight_EIO, strict=True)
    out_RO = torch.cat([rows_RI @ weight_IO for rows_RI, weight_IO in parts])
    return out_RO if bias is None else out_RO + bias


def _batched_linear(x_RI: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_transposed: bool) -> Tensor:
    """The same as a grouped product where all experts have equally many rows, and on a CPU three times as fast."""
    weight_EIO = weight if is_transposed else weight.transpose(1, 2)
    out_RO = torch.bmm(x_RI.view(len(weight), -1, x_RI.shape[-1]), weight_EIO).flatten(0, 1)
    return out_RO if bias is None else out_RO + bias


def experts_forward(experts: Any, hidden: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The grouped-matmul experts of transformers, with the same operations in the same order, reporting rows.

    An index that is no expert's number means nobody: such a slot adds nothing, costs nothing and is not reported.
    hidden: [T, D], or [B, S, D] where a block does not put its tokens in one row; the result has its shape.
    """
    return _routed(experts, hidden.flatten(0, -2), index_TK, weight_TK).view_as(hidden)


def _routed(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    if len(hidden_TD) == 1 and is_separate(experts) and not experts.__dict__.get(LISTENERS):
        one = run_shared_by_one_token if shares_parts(experts) else run_one_token
        return one(experts, sent(experts, hidden_TD), index_TK[0].tolist(), weight_TK[0])
    top_k = index_TK.shape[-1]
    expert_R, order = torch.sort(index_TK.reshape(-1))
    counts = torch.bincount(expert_R, minlength=experts.num_experts)
    ends_E = counts[: experts.num_experts].cumsum(0).to(torch.int32)
    # The length of the counts is known without asking the device, unlike the largest index.
    nobody = len(counts) > experts.num_experts
    if nobody:
        expert_R, order = expert_R[: int(ends_E[-1])], order[: int(ends_E[-1])]
    token_R, gate_R = order // top_k, weight_TK.reshape(-1)[order]
    sent_TD = sent(experts, hidden_TD)
    input_RD = sent_TD[token_R]

    def add_up(rows_RX: Tensor) -> Tensor:
        weighted_RX = _in_order(rows_RX * gate_R.unsqueeze(-1), order, index_TK.numel() if nobody else None)
        return weighted_RX.view(len(hidden_TD), top_k, -1).sum(dim=1)

    if _meets_once(experts):
        given = {name: rows_TX[token_R] for name, rows_TX in entered(experts, sent_TD, top_k).items()}
        added_TD = run_shared(experts, input_RD, counts[: experts.num_experts].tolist(), given, add_up)
        return torch.zeros_like(hidden_TD) if added_TD is None else added_TD.to(hidden_TD.dtype)
    inner_RF, output_RD = run(experts, input_RD, expert_R, ends_E)
    routed_TD = add_up(output_RD).to(hidden_TD.dtype)
    _report(experts, token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD)
    return routed_TD


def _in_order(sorted_RD: Tensor, order: Tensor, slots: int | None) -> Tensor:
    """Rows back where they came from; of `slots` places, those without a row are zero."""
    if slots is not None:
        return sorted_RD.new_zeros(slots, sorted_RD.shape[-1]).index_copy_(0, order, sorted_RD)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return sorted_RD[back]


# --- changing how experts are held and run ------------------------------------------------------------------


def round_experts(block: nn.Module, fused: Any, what: str) -> None:
    """Let an experts module round its rows: what experts are `sent`, or all that `experts` multiply."""
    fused.__dict__[ROUNDS] = what
    if not is_separate(fused):
        _run_here(block, fused)


def as_matrix(_part: str, _number: int, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
    """One matrix of one expert as it is."""
    return ExpertMatrix(weight_OI.contiguous(), bias_O)


def separate(
    block: nn.Module, fused: Any, held: Callable[[str, int, Tensor, Tensor | None], nn.Module] = as_matrix
) -> None:
    """Let an experts module hold its experts one by one; what it computes stays the same.

    held: how a matrix is held, from its projection, its expert's number, itself and its bias.
    """
    if is_separate(fused):
        return
    matrices, offsets = stacks(fused), biases(fused)
    experts = [
        nn.ModuleDict(
            {
                CHILDREN[part]: held(
                    part,
                    e,
                    stack_EOI[e].detach(),
                    offsets[part][e].detach().contiguous() if part in offsets else None,
                )
                for part, stack_EOI in matrices.items()
            }
        )
        for e in range(expert_count(fused))
    ]
    for name in [name for name, tensor in fused._parameters.items() if tensor is not None and "_proj" in name]:
        del fused._parameters[name]
    fused.register_module(UNFUSED, nn.ModuleList(experts))
    _run_here(block, fused)


def _run_here(block: Any, fused: Any) -> None:
    """Let experts run through the functions of this file, whoever calls them."""
    place, forward = (block, gate_on_input_forward) if gate_on_input(fused) else (fused, experts_forward)
    if type(place).forward is not forward:
        place.__class__ = running(type(place), forward)


def running(kind: Any, forward: Any) -> type:
    """A class that is `kind` in all but its forward."""
    return type(f"Own{kind.__name__}", (kind,), {"forward": forward})
