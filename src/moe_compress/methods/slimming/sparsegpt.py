"""SparseGPT (arXiv 2301.00774) for many matrices at once: prune column by column, the columns behind make up for it.

B experts, O outputs, I inputs, R rows of all matrices of an expert that share their inputs (gate and up). Weights are
held with the inputs first, [B, I, R], so that a column is contiguous; one factorisation serves all R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.methods.slimming.masks import lowest, lowest_in_groups

BLOCK = 128
SUB_BLOCK = 16
DAMPING = 0.01
RAISED = 10.0


def sparsegpt(
    weights: Sequence[Tensor],
    gram_BII: Tensor,
    share_B: Tensor,
    pattern: tuple[int, int] | None,
    names: Sequence[str],
) -> tuple[list[Tensor], list[int]]:
    """Pruned matrices [B, O, I] in fp32, and the experts for which the damping was raised.

    gram_BII: second moments of the inputs; share_B: of the weights of each matrix that go, spread evenly over blocks
    of BLOCK inputs, unless `pattern` (n of m) says which; names: of the experts, for errors. Weights of inputs that are
    always zero cost nothing and go first; those that are left keep their value. Raises ValueError for a Gram matrix
    that no damping makes definite.
    """
    gram_BII, dead_BI = _revived(gram_BII.float())
    factor_BII, raised = inverse_factor(gram_BII, names)
    # What an input that is always zero is multiplied with costs nothing.
    scale_BI = factor_BII.diagonal(dim1=1, dim2=2).masked_fill(dead_BI, torch.inf)
    sizes = [weight.shape[1] for weight in weights]
    weight_BIR = torch.cat([weight.float() for weight in weights], 1).transpose(1, 2).contiguous()
    inputs, group = weight_BIR.shape[1], pattern[1] if pattern else 1
    step = group * -(-BLOCK // group)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        part_BIR, here = weight_BIR[:, start:stop], factor_BII[:, start:stop, start:stop]
        scale_BI1 = scale_BI[:, start:stop, None]
        gone_BIR = None if pattern else _unstructured(part_BIR / scale_BI1, sizes, share_B, start)
        error_BIR = _prune_block(part_BIR, here, scale_BI1, gone_BIR, pattern)
        weight_BIR[:, stop:].baddbmm_(factor_BII[:, start:stop, stop:].transpose(1, 2), error_BIR, alpha=-1)
    return list(weight_BIR.transpose(1, 2).split(sizes, 1)), raised


def inverse_factor(gram_BII: Tensor, names: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Upper triangular U with U' U = (gram + damping)^-1 [B, I, I], and for whom the damping was raised.

    The damping is DAMPING times the mean of the diagonal, and RAISED times as much where that is not enough. With the
    order of the inputs reversed, U is the inverse of a Cholesky factor: no inverse is ever factorised.
    """
    mean_B = gram_BII.diagonal(dim1=1, dim2=2).mean(1)
    eye_II = torch.eye(gram_BII.shape[1], device=gram_BII.device)
    damping_B = DAMPING * mean_B
    lower_BII, failed_B = _factor(gram_BII, damping_B)
    raised = failed_B.nonzero().flatten().tolist()
    if raised:
        damping_B[raised] *= RAISED
        lower_BII[raised], failed_B = _factor(gram_BII[raised], damping_B[raised])
        bad = [names[raised[i]] for i in failed_B.nonzero().flatten().tolist()]
        if bad:
            raise ValueError(
                f"the Gram matrix of {', '.join(bad[:5])} is singular or holds NaN even with a damping of "
                f"{DAMPING * RAISED:g} of its diagonal: calibrate on more text (samples=) or in fp32 (dtype=float32)."
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


def _revived(gram_BII: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices with ones where an input was always zero, and which inputs were [B, I]."""
    dead_BI = gram_BII.diagonal(dim1=1, dim2=2) == 0
    return gram_BII + torch.diag_embed(dead_BI.to(gram_BII)), dead_BI


def _unstructured(root_BIR: Tensor, sizes: Sequence[int], share_B: Tensor, start: int) -> Tensor:
    """Which weights of a block go: in every matrix as many as bring its count up to its share by the block's end."""
    stop = start + root_BIR.shape[1]
    parts = []
    for part_BIO in root_BIR.abs().split(sizes, 2):
        whole = part_BIO.shape[2]
        until_B, before_B = ((share_B.double() * whole * end + 0.5).long() for end in (stop, start))
        parts.append(lowest(part_BIO.flatten(1), until_B - before_B).view_as(part_BIO))
    return torch.cat(parts, 2)


def _prune_block(
    part_BIR: Tensor,
    factor_BII: Tensor,
    scale_BI1: Tensor,
    gone_BIR: Tensor | None,
    pattern: tuple[int, int] | None,
) -> Tensor:
    """Prune a block of inputs in place; returns each column's error over its diagonal of the factor, [B, I, R]."""
    inputs = part_BIR.shape[1]
    error_BIR = torch.empty_like(part_BIR)
    group = pattern[1] if pattern else 1
    step = group * -(-SUB_BLOCK // group)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        for i in range(start, stop):
            if pattern and i % group == 0:
                root_BGR = (part_BIR[:, i : i + group] / scale_BI1[:, i : i + group]).abs()
                chosen_BGR = lowest_in_groups(root_BGR.transpose(1, 2), *pattern).transpose(1, 2)
            gone_BR = chosen_BGR[:, i % group] if pattern else gone_BIR[:, i]  # type: ignore[index]
            column_BR = part_BIR[:, i]
            error_BR = torch.where(gone_BR, column_BR / factor_BII[:, i, i, None], 0.0)
            column_BR.masked_fill_(gone_BR, 0)
            error_BIR[:, i] = error_BR
            if i + 1 < stop:
                rows_BI1 = factor_BII[:, i, i + 1 : stop, None]
                part_BIR[:, i + 1 : stop].addcmul_(rows_BI1, error_BR.unsqueeze(1), value=-1)
        behind_BIS = factor_BII[:, start:stop, stop:].transpose(1, 2)
        part_BIR[:, stop:].baddbmm_(behind_BIS, error_BIR[:, start:stop], alpha=-1)
    return error_BIR
