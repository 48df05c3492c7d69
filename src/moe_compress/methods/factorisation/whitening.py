"""Distances between matrices as their inputs see them: tr(D H D'), H the second moments of the inputs.

E experts, O outputs, I inputs, k a rank. Gram matrices are read one at a time and never stacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from moe_compress.methods.factorisation.structures import Grams

# Share of a Gram's mean diagonal that is added to its diagonal. Too small to move what tokens decide; enough to let
# plain distance decide where no token has been, and to keep rounding (1e-7 of the largest entries) from making it
# indefinite.
RIDGE = 1e-6
# Above, fp32 leaves too few digits in the directions of least energy.
CONDITION = 1e6
# Up to this side float64 costs a CPU no more than the calls around it.
SMALL = 1024
ITERATIONS = 16
TINY = torch.finfo(torch.float64).tiny


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32: TF32 keeps ten bits, and a Gram matrix squares the condition."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for small matrices on a CPU, fp32 otherwise."""
    return torch.float64 if weight.device.type == "cpu" and max(weight.shape[-2:]) <= SMALL else torch.float32


class Metric:
    """tr(D H D') for matrices D [O, I]. gram_II: H, positive definite; None: `scale` times the identity."""

    def __init__(self, gram_II: Tensor | None, scale: float = 1.0) -> None:
        self.gram_II, self.scale = gram_II, scale

    def times(self, matrix: Tensor) -> Tensor:
        """matrix H, for [..., I]."""
        return matrix * self.scale if self.gram_II is None else matrix @ self.gram_II.to(matrix.dtype)

    def squared(self, matrix_OI: Tensor, left_OO: Tensor | None = None) -> float:
        """tr(D H D'), or with a left Gram G tr(G D H D')."""
        seen_OI = matrix_OI if left_OO is None else left_OO @ matrix_OI
        return float((seen_OI * self.times(matrix_OI)).sum(dtype=torch.float64))

    @cached_property
    def lower_II(self) -> Tensor | None:
        """The Cholesky factor of H in float64; None stands for a multiple of the identity.

        A matrix that rounding has made indefinite gets its negative eigenvalues raised first.
        """
        return None if self.gram_II is None else factor(self.gram_II)

    @cached_property
    def ill_conditioned(self) -> bool:
        """Whether the condition of H is above CONDITION: an estimate from below, by power iterations."""
        if self.gram_II is None or self.lower_II is None:
            return False
        gram_II, lower_II = self.gram_II.double(), self.lower_II
        ones_I1 = torch.ones(len(gram_II), 1, dtype=torch.float64, device=gram_II.device)
        large = small = ones_I1 + torch.arange(len(gram_II), device=gram_II.device)[:, None] % 7  # of no symmetry
        for _ in range(ITERATIONS):
            large, small = gram_II @ (large / large.norm()), torch.cholesky_solve(small / small.norm(), lower_II)
        return float(large.norm() * small.norm()) > CONDITION

    def whiten(self, matrix_OI: Tensor) -> Tensor:
        """D L with L L' = H, in float64 where the condition of H asks for it."""
        if self.lower_II is None:
            return matrix_OI * self.scale**0.5
        dtype = torch.float64 if self.ill_conditioned else matrix_OI.dtype
        return matrix_OI.to(dtype) @ self.lower_II.to(dtype)

    def unwhiten(self, rows_kI: Tensor) -> Tensor:
        """R L^-1, in float64."""
        if self.lower_II is None:
            return rows_kI.double() / self.scale**0.5
        return torch.linalg.solve_triangular(self.lower_II, rows_kI.double(), upper=False, left=False)

    def divide(self, matrix_OI: Tensor) -> Tensor:
        """D H^-1, in float64."""
        if self.lower_II is None:
            return matrix_OI.double() / self.scale
        return torch.cholesky_solve(matrix_OI.double().T, self.lower_II).T


class Metrics:
    """The metrics of E experts, made when asked for; plain distance if there are no Grams.

    Where an expert saw nothing (a Gram of zeros) plain distance counts, and beside experts that did, as little as their
    ridge: it must not move what they share. Grams may be means or sums; the ridge makes no difference between them.
    """

    def __init__(self, grams: Grams | None, weight_EOI: Tensor, dtype: torch.dtype | None = None) -> None:
        if grams is not None and len(grams) != len(weight_EOI):
            raise ValueError(f"{len(weight_EOI)} experts need as many Gram matrices, not {len(grams)}.")
        self.grams, self.experts = grams, len(weight_EOI)
        self.device, self.dtype = weight_EOI.device, dtype or working_dtype(weight_EOI)
        self.inputs = weight_EOI.shape[-1]

    def __getitem__(self, e: int) -> Metric:
        gram_II = self._ridged(e)
        return Metric(gram_II) if gram_II is not None else Metric(None, self._sum[1] if self.grams is not None else 1.0)

    @cached_property
    def pooled(self) -> Metric:
        """The sum of all, in float64: a shared matrix is divided by it once, whatever its condition."""
        return Metric(self._sum[0]) if self._sum[0] is not None else Metric(None, self.experts * self._sum[1])

    @property
    def mean_energy(self) -> float:
        """The mean diagonal of the experts' Grams; 1 without any."""
        gram_II = self.pooled.gram_II
        return 1.0 if gram_II is None else float(gram_II.diagonal().mean()) / self.experts

    @cached_property
    def _sum(self) -> tuple[Tensor | None, float]:
        """The sum of all Grams in float64, and what an expert without one counts."""
        total_II, unseen = None, 0
        for e in range(self.experts):
            gram_II = self._ridged(e)
            if gram_II is None:
                unseen += 1
            else:
                total_II = gram_II.double() if total_II is None else total_II.add_(gram_II)
        if total_II is None:
            return None, 1.0
        scale = RIDGE * float(total_II.diagonal().mean()) / (self.experts - unseen)
        total_II.diagonal().add_(unseen * scale)
        return total_II, scale

    def _ridged(self, e: int) -> Tensor | None:
        if self.grams is None:
            return None
        gram_II = self.grams[e].to(self.device, self.dtype, copy=True)
        if gram_II.shape != (self.inputs, self.inputs):
            raise ValueError(f"the Gram matrix of expert {e} is {[*gram_II.shape]} for {self.inputs} inputs.")
        mean = float(gram_II.diagonal().mean())
        if not mean < float("inf"):
            raise ValueError(f"the Gram matrix of expert {e} holds NaN or infinity.")
        if mean <= 0:
            return None
        gram_II.diagonal().add_(RIDGE * mean)
        return gram_II


def factor(gram_NN: Tensor) -> Tensor:
    """The Cholesky factor in float64 of a positive definite matrix, with eigenvalues below the ridge raised to it."""
    gram_NN = gram_NN.double()
    lower_NN, failed = torch.linalg.cholesky_ex(gram_NN)
    if not int(failed):
        return lower_NN
    value_N, vector_NN = torch.linalg.eigh(gram_NN)
    least = max(RIDGE * float(gram_NN.diagonal().mean()), TINY)
    return torch.linalg.cholesky((vector_NN * value_N.clamp(min=least)) @ vector_NN.T)


def solve_positive(gram_kk: Tensor, right_kN: Tensor) -> Tensor:
    """gram^+ right in float64 for a positive semi-definite Gram: by Cholesky, else by its eigenvectors."""
    gram_kk, right_kN = gram_kk.double(), right_kN.double()
    lower_kk, failed = torch.linalg.cholesky_ex(gram_kk)
    if not int(failed) and bool(lower_kk.diagonal().min() > 1e-7 * lower_kk.diagonal().max()):
        return torch.cholesky_solve(right_kN, lower_kk)
    value_k, vector_kk = torch.linalg.eigh(gram_kk)
    kept_k = value_k > 1e-12 * value_k[-1].clamp(min=TINY)
    vector_kk = vector_kk[:, kept_k]
    return vector_kk @ ((vector_kk.T @ right_kN) / value_k[kept_k, None])


def leading(gram_NN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(the largest `rank` eigenvalues, descending, not below 0; their vectors [N, rank])."""
    value_N, vector_NN = torch.linalg.eigh(gram_NN)
    first = len(value_N) - rank
    return value_N[first:].flip(0).clamp(min=0), vector_NN[:, first:].flip(1)
