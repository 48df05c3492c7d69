"""The experts function: what really went through the experts, for every family, without changing a bit of it.

T tokens, K experts per token, E experts, D model width, F inner width, R = T*K routed (token, expert) pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

EXPERTS_FUNCTION = "moe_compress"


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


def tap(block: nn.Module, experts: nn.Module, listener: Listener | None) -> None:
    """Report every pass through the fused experts of a block to `listener` (None: stop).

    Experts that transformers dispatches (all families but Llama-4) report from the experts function; Llama-4's
    block, which runs every expert on every token, is replaced by a routed forward while it is listened to.
    """
    experts.__dict__["_moe_compress_listener"] = listener
    if hasattr(experts, "_apply_gate"):
        return
    if listener is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = functools.partial(_gate_on_input_forward, block)


def _gate_on_input_forward(block: Any, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
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
    input_RD = hidden_TD[token_R] * gate_R.unsqueeze(-1)
    gate_RF, up_RF = _grouped_linear(input_RD, experts.gate_up_proj, ends_E, is_transposed=True).chunk(2, dim=-1)
    inner_RF = up_RF * experts.act_fn(gate_RF)
    added_RD = _grouped_linear(inner_RF, experts.down_proj, ends_E, is_transposed=True)
    routed_TD = torch.zeros_like(hidden_TD).index_add_(0, token_R, added_RD)
    output_RD = added_RD / gate_R.unsqueeze(-1)
    listener = experts.__dict__["_moe_compress_listener"]
    listener(RoutedRows(token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD))
    return block.shared_expert(hidden_TD) + routed_TD, logits_TE


def use_experts_function(model: PreTrainedModel) -> None:
    """Let every fused experts module of the model run through the function that can be tapped."""
    model.set_experts_implementation(EXPERTS_FUNCTION)


def _experts_forward(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The grouped-matmul experts of transformers, with the same operations in the same order, reporting rows."""
    top_k = index_TK.shape[-1]
    expert_R, order = torch.sort(index_TK.reshape(-1))
    token_R, gate_R = order // top_k, weight_TK.reshape(-1)[order]
    ends_E = torch.bincount(expert_R, minlength=experts.num_experts).cumsum(0).to(torch.int32)

    def linear(x_RI: Tensor, name: str) -> Tensor:
        bias_EO = getattr(experts, f"{name}_bias") if experts.has_bias else None
        bias_RO = None if bias_EO is None else bias_EO[expert_R]
        weight = getattr(experts, name)
        return _grouped_linear(x_RI, weight, ends_E, bias=bias_RO, is_transposed=experts.is_transposed)

    input_RD = hidden_TD[token_R]
    inner_RF = linear(input_RD, "gate_up_proj" if experts.has_gate else "up_proj")
    inner_RF = experts._apply_gate(inner_RF) if experts.has_gate else experts.act_fn(inner_RF)
    output_RD = linear(inner_RF, "down_proj")
    if experts.has_post_expert_norm:
        output_RD = experts.post_expert_norm(output_RD)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    weighted_RD = (output_RD * gate_R.unsqueeze(-1))[back]
    routed_TD = weighted_RD.view(len(hidden_TD), top_k, -1).sum(dim=1).to(hidden_TD.dtype)
    listener = experts.__dict__.get("_moe_compress_listener")
    if listener is not None:
        listener(RoutedRows(token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD))
    return routed_TD


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, _experts_forward)
