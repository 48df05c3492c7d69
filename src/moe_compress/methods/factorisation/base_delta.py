"""Structure base_delta: one core for all experts of a layer, and a low rank for what each has besides.

E experts, O outputs, I inputs, r a rank. D2-MoE (arXiv 2502.17298) and the shared cores of this project's founding
documents, with both halves in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.methods.factorisation.low_rank import truncated
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metrics


def solve_base_delta(
    weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings
) -> tuple[Factors, list[float]]:
    """Alternate, from no deltas: core = sum (W_e - D_e) H_e [sum H_e]^-1, then D_e = the best low rank of W_e - core.

    Each is the optimum for what the other left, so the loss after each sweep never rises.
    """
    core_OI = shared_mean(weight_EOI, metrics)
    losses: list[float] = []
    for sweep in range(settings.sweeps):
        deltas, error_OI, loss = _deltas(weight_EOI, core_OI, metrics, size.ranks)
        losses.append(loss)
        if sweep + 1 < settings.sweeps:
            core_OI = core_OI + metrics.pooled.divide(error_OI)
    left, right = ([delta[side].float() for delta in deltas] for side in (0, 1))
    return Factors(left=left, right=right, core=core_OI.float()), losses


def shared_mean(weight_EOI: Tensor, metrics: Metrics) -> Tensor:
    """The one matrix nearest to all, sum W_e H_e [sum H_e]^-1, float64 (RegMean, arXiv 2212.09849)."""
    total_OI = torch.zeros_like(weight_EOI[0], dtype=torch.float64)
    for e, weight_OI in enumerate(weight_EOI):
        total_OI += metrics[e].times(weight_OI.to(metrics.dtype))
    return metrics.pooled.divide(total_OI)


def _deltas(
    weight_EOI: Tensor, core_OI: Tensor, metrics: Metrics, ranks: list[int]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, float]:
    """(the best deltas for a core, sum of (W_e - core - D_e) H_e in float64, the loss)."""
    deltas, loss = [], 0.0
    total_OI = torch.zeros_like(core_OI)
    for e, rank in enumerate(ranks):
        metric = metrics[e]
        rest_OI = (weight_EOI[e].double() - core_OI).to(metrics.dtype)
        left_Or, right_rI = truncated(rest_OI, rank, metric)
        error_OI = rest_OI - left_Or @ right_rI
        weighed_OI = metric.times(error_OI)
        loss += float((error_OI * weighed_OI).sum(dtype=torch.float64))
        total_OI += weighed_OI
        deltas.append((left_Or, right_rI))
    return deltas, total_OI, loss
