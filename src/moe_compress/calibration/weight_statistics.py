"""Sums over the weights of experts alone, without any text."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.models.moe import MoEView, inner_width


def weight_sums(view: MoEView) -> dict[str, Tensor]:
    """Sums over each expert's weights, float64 [E]: `abs`, `square`, `count`; and `router_norm`."""
    sums = {key: torch.zeros(view.num_experts, dtype=torch.float64) for key in ("abs", "square", "count")}
    for weight in view.stacks().values():
        sums["abs"] += _row_norms(weight, 1).sum(1)
        sums["square"] += _row_norms(weight, 2).square().sum(1)
        sums["count"] += weight.shape[1] * weight.shape[2] / inner_width(view) * torch.tensor(view.widths)
    row_R = torch.linalg.vector_norm(view.router_rows_ED.double(), 2, dim=1).cpu()
    if view.row_to_expert is not None:  # an expert with several rows is as long as the longest of them
        led = torch.tensor(view.row_to_expert)
        row_R = torch.zeros(max(view.num_experts, 1 + int(led.max())), dtype=torch.float64).scatter_reduce(
            0, led, row_R, "amax"
        )[: view.num_experts]
    sums["router_norm"] = row_R
    return sums


def _row_norms(weight_EOI: Tensor, order: int) -> Tensor:
    """Norm of every row, float64 [E, O]. One sum over a whole matrix, in its own dtype, would be percents off."""
    rows = [torch.linalg.vector_norm(weight_OI, order, dim=1, dtype=torch.float32) for weight_OI in weight_EOI]
    return torch.stack(rows).double().cpu()
