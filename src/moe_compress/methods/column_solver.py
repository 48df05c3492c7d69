"""Changing matrices column by column while the columns behind make up for it: what SparseGPT and GPTQ have in common.

Weights are held with the inputs first, [B, I, R], so that a column is contiguous; one factorisation serves all R rows
of all matrices of an expert that share their inputs (gate and up). B experts, I inputs, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 128
SUB_BLOCK = 16
DAMPING = 0.01
RAISED = 10.0


class Rule(Protocol):
    """What becomes of the columns."""

    def block(self, weight_BIR: Tensor, start: int, stop: int) -> None:
        """A block of inputs begins; columns up to `stop` are as the ones before it have left them."""

    def column(self, weight_BIR: Tensor, i: int) -> Tensor:
        """What column i becomes, [B, R]; the columns behind it that belong to its group are up to date."""


def compensate(weight_BIR: Tensor, factor_BII: Tensor, rule: Rule, group: int = 1) -> None:
    """Change all columns in place, in order, by the rule.

    factor_BII: see `inverse_factor`; group: columns that the rule looks at together are never parted by a sub-block,
    unless a block is too short for them.
    """
    inputs = weight_BIR.shape[1]
    if group > BLOCK:  # a group begins where all before it is done
        sub_block, block = next(n for n in range(SUB_BLOCK, 0, -1) if group % n == 0), group
    else:
        sub_block = group * -(-SUB_BLOCK // group)
        block = sub_block * -(-BLOCK // sub_block)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        rule.block(weight_BIR, start, stop)
        error_BIR = torch.empty_like(weight_BIR[:, start:stop])
        for first in range(start, stop, sub_block):
            last = min(first + sub_block, stop)
            for i in range(first, last):
                new_BR = rule.column(weight_BIR, i)
                error_BR = (weight_BIR[:, i] - new_BR) / factor_BII[:, i, i, None]
                weight_BIR[:, i] = new_BR
                error_BIR[:, i - start] = error_BR
                if i + 1 < last:
                    rows_BI1 = factor_BII[:, i, i + 1 : last, None]
                    weight_BIR[:, i + 1 : last].addcmul_(rows_BI1, error_BR.unsqueeze(1), value=-1)
            if last < stop:
                behind_BIS = factor_BII[:, first:last, last:stop].transpose(1, 2)
                weight_BIR[:, last:stop].baddbmm_(behind_BIS, error_BIR[:, first - start : last - start], alpha=-1)
        if stop < inputs:
            behind_BIS = factor_BII[:, start:stop, stop:].transpose(1, 2)
            weight_BIR[:, stop:].baddbmm_(behind_BIS, error_BIR, alpha=-1)


def inputs_first(weights: Sequence[Tensor]) -> Tensor:
    """Matrices [B, O, I] of the same inputs as one, [B, I, R], in fp32."""
    return torch.cat([weight.float() for weight in weights], 1).transpose(1, 2).contiguous()


def inverse_factor(gram_BII: Tensor, names: Sequence[str], damping: float = DAMPING) -> tuple[Tensor, list[int]]:
    """Upper triangular U with U' U = (gram + damping)^-1 [B, I, I], and for whom the damping was raised.

    The damping is that share of the mean of the diagonal, and RAISED times as much where that is not enough. With the
    order of the inputs reversed, U is the inverse of a Cholesky factor: no inverse is ever factorised.
    """
    mean_B = gram_BII.diagonal(dim1=1, dim2=2).mean(1)
    eye_II = torch.eye(gram_BII.shape[1], device=gram_BII.device)
    damping_B = damping * mean_B
    lower_BII, failed_B = _factor(gram_BII, damping_B)
    raised = failed_B.nonzero().flatten().tolist()
    if raised:
        damping_B[raised] *= RAISED
        lower_BII[raised], failed_B = _factor(gram_BII[raised], damping_B[raised])
        bad = [names[raised[i]] for i in failed_B.nonzero().flatten().tolist()]
        if bad:
            raise ValueError(
                f"the Gram matrix of {', '.join(bad[:5])} is singular or holds NaN even with a damping of "
                f"{damping * RAISED:g} of its diagonal: calibrate on more text (samples=) or in fp32 (dtype=float32)."
            )
    inverse_BII = torch.linalg.solve_triangular(lower_BII, eye_II.expand_as(gram_BII), upper=False)
    return inverse_BII.flip(1, 2), raised


def _factor(gram_BII: Tensor, damping_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of the damped matrices in reversed order, and which of them failed."""
    damped_BII = gram_BII.flip(1, 2)
    damped_BII.diagonal(dim1=1, dim2=2).add_(damping_B.unsqueeze(1))
    finite_B = damped_BII.flatten(1).isfinite().all(1)
    lower_BII, info_B = torch.linalg.cholesky_ex(torch.where(finite_B[:, None, None], damped_BII, 0.0))
    return lower_BII, (info_B != 0) | ~finite_B


def revived(gram_BII: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices with the mean of the others where an input was always zero, and which inputs were [B, I].

    A fixed number there would weigh much beside small inputs, and little beside large ones.
    """
    diagonal_BI = gram_BII.diagonal(dim1=1, dim2=2)
    dead_BI = diagonal_BI == 0
    live_B = (~dead_BI).sum(1)
    mean_B = torch.where(live_B > 0, diagonal_BI.sum(1) / live_B.clamp_min(1), 1.0)
    return gram_BII + torch.diag_embed(dead_BI * mean_B.unsqueeze(1)), dead_BI
