"""Structure sparse_low_rank: a low rank, and the single weights that it misses most (RS-MoE; OATS, arXiv 2409.13652).

O outputs, I inputs, r a rank. Every row of a residue keeps equally many weights, so that it packs into a rectangle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.methods.factorisation.low_rank import truncated
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metric, Metrics
from moe_compress.methods.pruning.masks import lowest, lowest_in_groups

Parts = tuple[Tensor, Tensor, Tensor]


def solve_sparse_low_rank(
    weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings
) -> tuple[Factors, list[float]]:
    """Every expert for itself: choose the residue of the low rank, then the low rank of what the residue leaves.

    Which weights stay is judged input by input (the diagonal of the Gram), so a sweep may lose: the best one counts.
    """
    parts: list[Parts] = []
    total = [0.0] * settings.sweeps
    for e, rank in enumerate(size.ranks):
        found, losses = _alternate(weight_EOI[e].to(metrics.dtype), rank, metrics[e], size, settings.sweeps)
        parts.append(found)
        total = [before + loss for before, loss in zip(total, losses, strict=True)]
    left, right, residue = ([one[part].float() for one in parts] for part in range(3))
    return Factors(left=left, right=right, residue=residue), total


def _alternate(weight_OI: Tensor, rank: int, metric: Metric, size: Size, sweeps: int) -> tuple[Parts, list[float]]:
    """(left, right and residue of the best sweep, the least loss after each)."""
    left_Or, right_rI = truncated(weight_OI, rank, metric)
    best: Parts | None = None
    losses: list[float] = []
    for _ in range(sweeps):
        residue_OI = sparsest(weight_OI - left_Or @ right_rI, metric, size)
        left_Or, right_rI = truncated(weight_OI - residue_OI, rank, metric)
        # Once more in the same places: the low rank has moved.
        residue_OI = torch.where(residue_OI != 0, weight_OI - left_Or @ right_rI, 0.0)
        loss = metric.squared(weight_OI - left_Or @ right_rI - residue_OI)
        if best is None or loss < losses[-1]:
            best = left_Or, right_rI, residue_OI
        losses.append(min([loss, *losses[-1:]]))
    assert best is not None
    return best, losses


def sparsest(matrix_OI: Tensor, metric: Metric, size: Size) -> Tensor:
    """The matrix with all but its weightiest entries zero, by |w| times the root of what their input has as energy."""
    inputs = matrix_OI.shape[1]
    score_OI = matrix_OI.abs()
    if metric.gram_II is not None:
        score_OI = score_OI * metric.gram_II.diagonal().sqrt()
    if size.pattern is not None:
        return matrix_OI.masked_fill(lowest_in_groups(score_OI[None], *size.pattern)[0], 0)
    gone_O = torch.full((len(matrix_OI),), inputs - size.nonzeros, device=matrix_OI.device)
    return matrix_OI.masked_fill(lowest(score_OI, gone_O), 0)
