"""What stands between a router and its experts: merged experts, constants in place of experts, skipped experts.

Shipped inside edited checkpoints, so it needs torch alone. T tokens, K experts per token, D model width, N novices
(constants that dropped experts leave behind).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .unfused_experts import expert_count

REROUTE = "_moe_compress_reroute"
NOVICES = "novices"


def rerouting_of(fused: nn.Module) -> dict[str, Any]:
    """What happens between router and experts, kept on the experts module."""
    nothing = {"alias": None, "threshold": None, "renormalise": False, "heard": False, "active": None}
    return fused.__dict__.setdefault(REROUTE, nothing)


def hook_rerouting(fused: Any) -> None:
    """Stand between router and experts, if there is anything to do."""
    rerouted = rerouting_of(fused)
    if rerouted["alias"] is None and rerouted["threshold"] is None:
        return
    if rerouted["threshold"] is not None or fused._parameters.get(NOVICES) is not None:
        # With expert parallelism transformers' kernels expect ids that mean nobody; only so do they leave them out.
        fused._is_expert_parallel = True
    if not rerouted["heard"]:
        rerouted["heard"] = True
        fused.register_forward_pre_hook(_before)
        fused.register_forward_hook(_after)


def _before(fused: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden_TD, index_TK, gate_TK = args
    index_TK, gate_TK, rerouting_of(fused)["added"] = rerouted_choice(fused, index_TK, gate_TK)
    return hidden_TD, index_TK, gate_TK


def _after(fused: Any, _args: Any, output_TD: Tensor) -> Tensor:
    added_TD = rerouting_of(fused).pop("added")
    return output_TD if added_TD is None else output_TD + added_TD.to(output_TD.dtype).view_as(output_TD)


def rerouted_choice(fused: Any, index_TK: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Experts, gates and what novices add. The id `num_experts` means nobody: its gate is 0 and it costs nothing."""
    how, nobody, novices_ND = rerouting_of(fused), expert_count(fused), fused._parameters.get(NOVICES)
    weak_TK = None
    if how["threshold"] is not None:
        weak_TK = gate_TK < how["threshold"] * gate_TK.amax(-1, keepdim=True)
        left_TK = gate_TK.masked_fill(weak_TK, 0)
        if how["renormalise"]:
            left_TK = left_TK * (gate_TK.sum(-1, keepdim=True) / left_TK.sum(-1, keepdim=True))
        gate_TK = left_TK
    if how["alias"] is not None:
        index_TK = torch.as_tensor(how["alias"], device=index_TK.device, dtype=index_TK.dtype)[index_TK]
    if weak_TK is not None:
        index_TK = index_TK.masked_fill(weak_TK, nobody)
    if novices_ND is None:
        return index_TK, gate_TK, None
    real_TK = index_TK < nobody
    idle_TK = real_TK if weak_TK is None else real_TK | weak_TK
    row_TK = torch.where(idle_TK, 0, index_TK - nobody)
    added_TD = (novices_ND[row_TK] * gate_TK.masked_fill(idle_TK, 0).unsqueeze(-1).to(novices_ND.dtype)).sum(1)
    return torch.where(real_TK, index_TK, nobody), gate_TK.masked_fill(~real_TK, 0), added_TD
