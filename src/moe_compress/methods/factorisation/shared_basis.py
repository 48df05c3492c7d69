"""Structure shared_basis: all experts read one subspace of their inputs, or write one of their outputs.

E experts, O outputs, I inputs, k a rank. MoLAE (arXiv 2503.23100), MoE-SVD (ICML 2025) and Sub-MoE (arXiv 2506.23266)
without their merging steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.methods.factorisation.basis_mixture import Mixture, input_basis
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metrics, leading


def solve_shared_basis(
    weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings
) -> tuple[Factors, list[float]]:
    """The shared side as the size says."""
    if size.side == "out":
        return _shared_outputs(weight_EOI, metrics, size.rank)
    return _shared_inputs(weight_EOI, metrics, size.rank, settings.sweeps)


def _shared_inputs(weight_EOI: Tensor, metrics: Metrics, rank: int, sweeps: int) -> tuple[Factors, list[float]]:
    """left_e basis: the optimum of one Gram for all, the pooled one, then sweeps in which every expert has its own."""
    basis_1kI = input_basis(weight_EOI, metrics.pooled, rank)[None]
    mixture = Mixture(weight_EOI, metrics, basis_1kI, torch.ones(len(weight_EOI), 1, device=weight_EOI.device))
    losses = mixture.solve(sweeps if metrics.grams is not None else 1)
    return Factors(left=mixture.lefts(), right=[], basis=mixture.bases_nkI[0].float()), losses


def _shared_outputs(weight_EOI: Tensor, metrics: Metrics, rank: int) -> tuple[Factors, list[float]]:
    """basis right_e: U, the leading eigenvectors of S = sum W_e H_e W_e', and right_e = U' W_e.

    The optimum for any Grams. For an orthonormal U and H_e = L L', the best right_e minimises |(W_e - U R) L|^2, where
    U R L is best at the projection U U' W_e L whatever L is: R = U' W_e. What is left is tr S - tr U' S U, least for
    the leading eigenvectors of S (Ky Fan); and every basis of rank k spans what an orthonormal one does.
    """
    outputs = weight_EOI.shape[1]
    seen_OO = torch.zeros(outputs, outputs, dtype=torch.float64, device=weight_EOI.device)
    for e in range(len(weight_EOI)):
        weight_OI = weight_EOI[e].to(metrics.dtype)
        seen_OO += metrics[e].times(weight_OI) @ weight_OI.T
    basis_Ok = leading(seen_OO, rank)[1].to(metrics.dtype)
    right, loss = [], 0.0
    for e in range(len(weight_EOI)):
        weight_OI = weight_EOI[e].to(metrics.dtype)
        right.append(basis_Ok.T @ weight_OI)
        loss += metrics[e].squared(weight_OI - basis_Ok @ right[-1])
    return Factors(left=[], right=[right_kI.float() for right_kI in right], basis=basis_Ok.float()), [loss]
