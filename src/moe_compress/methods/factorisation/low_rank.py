"""Structure svd: the best low rank of every expert as its inputs see it (SVD-LLM, arXiv 2403.07378).

E experts, O outputs, I inputs, r a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metric, Metrics, leading, solve_positive


def truncated(matrix_OI: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """(left [O, rank], right [rank, I]): the matrix of that rank nearest to this one; exact (Eckart-Young).

    With U the leading eigenvectors of M H M' [O, O] it is U U' M: nothing is divided by H. With fewer inputs than
    outputs the smaller L' M' M L [I, I] is decomposed, and its vectors are mapped back by L^-1.
    """
    outputs, inputs = matrix_OI.shape
    if outputs <= inputs:
        left_Or = leading(metric.times(matrix_OI) @ matrix_OI.T, rank)[1]
        return left_Or, left_Or.T @ matrix_OI
    white_OI = metric.whiten(matrix_OI)
    vector_Ir = leading(white_OI.T @ white_OI, rank)[1]
    right_rI = metric.unwhiten(vector_Ir.T)
    # Rows of length 1, so that what is stored in few bits has its magnitude in one place.
    length_r = right_rI.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    left_Or = (white_OI @ vector_Ir).double() * length_r
    return left_Or.to(matrix_OI.dtype), (right_rI / length_r[:, None]).to(matrix_OI.dtype)


def spectrum(matrix_OI: Tensor, metric: Metric) -> Tensor:
    """The squared singular values of M L, descending, [min(O, I)]: what each further rank is worth."""
    outputs, inputs = matrix_OI.shape
    if outputs <= inputs:
        return leading(metric.times(matrix_OI) @ matrix_OI.T, outputs)[0]
    white_OI = metric.whiten(matrix_OI)
    return leading(white_OI.T @ white_OI, inputs)[0]


def best_left(weight_OI: Tensor, right_kI: Tensor, metric: Metric) -> Tensor:
    """W H B' (B H B')^+, the best left side [O, k] for a right one."""
    weighed_kI = metric.times(right_kI)
    solved_kO = solve_positive(weighed_kI @ right_kI.T, weighed_kI @ weight_OI.T)
    return solved_kO.T.to(weight_OI.dtype)


def solve_svd(weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings) -> tuple[Factors, list[float]]:
    """Every expert for itself: the optimum, in one step."""
    left, right, loss = [], [], 0.0
    for e, rank in enumerate(size.ranks):
        weight_OI, metric = weight_EOI[e].to(metrics.dtype), metrics[e]
        left_Or, right_rI = truncated(weight_OI, rank, metric)
        loss += metric.squared(weight_OI - left_Or @ right_rI)
        left.append(left_Or.float())
        right.append(right_rI.float())
    return Factors(left=left, right=right), [loss]
