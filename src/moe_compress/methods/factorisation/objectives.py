"""What factors are made near to, besides the experts as their inputs see them: changes before and after any solver.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors, Grams
from moe_compress.methods.factorisation.whitening import RIDGE, Metric, Metrics, full_precision, working_dtype


@torch.no_grad()
def anchored_target(weight_OI: Tensor, cross_II: Tensor, gram_II: Tensor) -> Tensor:
    """W K H'^-1 [O, I], to be factorised with the Gram H': the factors then give W x on inputs x' (AA-SVD, 2604.02119).

    cross_II: K = sum x y^T, x the original model's inputs, y = x' those after what was compressed before; gram_II: H' =
    sum y y^T. As |W x - V y|^2 = |(W K H'^-1 - V) y|^2 + what no V changes, any solver serves. Both get the same ridge:
    where no token has been the target is the weight itself. A Gram of zeros leaves the weight.
    """
    with full_precision():
        cross_II, gram_II = (moment_II.to(weight_OI.device, torch.float64) for moment_II in (cross_II, gram_II))
        ridge = RIDGE * float(gram_II.diagonal().mean())
        if ridge <= 0:
            return weight_OI.float()
        eye_II = ridge * torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)
        return Metric(gram_II + eye_II).divide(weight_OI.double() @ (cross_II + eye_II)).float()


@torch.no_grad()
def two_sided(
    structure: str, weight_EOI: Tensor, left_grams: Grams, size: Size
) -> tuple[Tensor, Callable[[Factors], Factors]]:
    """(what to factorise in the experts' place, what takes its factors back): errors R' D L with R R' = G (2604.00821).

    left_grams: G_e [O, O], second moments of the gradients of what an expert puts out. Where experts share what writes
    outputs (a core, an output basis) there can be one R alone, and it is of the sum of all G_e. R is in units of their
    mean, so that what is left of tiny gradients fits few bits. Raises ValueError for sparse_low_rank: R'^-1 leaves no
    zeros.
    """
    if structure == "sparse_low_rank":
        raise ValueError("objective=two_sided mixes outputs, so structure=sparse_low_rank would not stay sparse.")
    shared = structure in ("base_delta", "wrapper") or (structure == "shared_basis" and size.side == "out")
    with full_precision():
        metrics = Metrics(left_grams, weight_EOI.transpose(1, 2), working_dtype(weight_EOI))
        unit = metrics.mean_energy**0.5
        seen = [
            _side(metrics, e, shared).whiten(weight_OI.T.to(metrics.dtype)).T.to(metrics.dtype) / unit
            for e, weight_OI in enumerate(weight_EOI)
        ]

    def back(matrix: Tensor, e: int) -> Tensor:
        with full_precision():
            return _side(metrics, e, shared).unwhiten(matrix.T).T.mul(unit).float().contiguous()

    def undo(factors: Factors) -> Factors:
        return replace(
            factors,
            left=[back(left_Or, e) for e, left_Or in enumerate(factors.left)],
            core=None if factors.core is None else back(factors.core, 0),
            basis=factors.basis if factors.left or factors.basis is None else back(factors.basis, 0),
        )

    return torch.stack(seen), undo


def _side(metrics: Metrics, e: int, shared: bool) -> Metric:
    return metrics.pooled if shared else metrics[e]
