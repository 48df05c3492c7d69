"""Structure basis_mixture: left_e times a mixture of bases that all experts of a layer share (MoBE, arXiv 2508.05257).

E experts, O outputs, I inputs, k a rank, n bases. Linear mixtures are solved by alternating least squares in place of
MoBE's gradient steps; its activation is an option (`activated.py`). One basis and no mixing is a shared input basis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compress.methods.factorisation.activated import refined
from moe_compress.methods.factorisation.conjugate_gradients import conjugate_gradients
from moe_compress.methods.factorisation.low_rank import best_left
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metric, Metrics, factor, leading, solve_positive

CG_STEPS = 4
# Sweeps end when one gains less than this share of the loss.
GAIN = 1e-6
# Of other groups' bases at the start, beside 1 of an expert's own.
NOISE = 0.3


def solve_basis_mixture(
    weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings
) -> tuple[Factors, list[float]]:
    """The linear mixture, then, with an activation, gradient steps from there (whose losses need not fall)."""
    mixture = Mixture(weight_EOI, metrics, *_started(weight_EOI, metrics, size, settings.seed))
    losses = mixture.solve(settings.sweeps)
    factors = Factors(left=mixture.lefts(), right=[], bases=mixture.bases_nkI.float(), mix=mixture.mix_En.float())
    if settings.activation == "linear":
        return factors, losses
    factors, refining = refined(weight_EOI, metrics, factors, settings)
    return factors, [*losses, *refining]


def input_basis(weight_EOI: Tensor, pooled: Metric, rank: int) -> Tensor:
    """[k, I]: the leading eigenvectors of L' (sum W_e' W_e) L, L L' the pooled Gram, mapped back by L^-1; float64.

    With the best left sides it is the optimum if all experts see the same inputs.
    """
    white_II = torch.zeros(weight_EOI.shape[-1], weight_EOI.shape[-1], dtype=torch.float64, device=weight_EOI.device)
    for weight_OI in weight_EOI:
        white_OI = pooled.whiten(weight_OI.double())
        white_II += white_OI.T @ white_OI
    return pooled.unwhiten(leading(white_II, rank)[1].T)


class Mixture:
    """Alternating least squares over left sides, mixing weights and bases; the loss never rises.

    bases_nkI, mix_En: where it starts. The experts' Grams are read once a sweep for the first two, and once a step of
    conjugate gradients for the bases.
    """

    def __init__(self, weight_EOI: Tensor, metrics: Metrics, bases_nkI: Tensor, mix_En: Tensor) -> None:
        self.weight_EOI, self.metrics = weight_EOI, metrics
        self.bases_nkI, self.mix_En = bases_nkI.to(metrics.dtype), mix_En.to(metrics.dtype)
        rank = bases_nkI.shape[1]
        self.left = [weight_OI.new_zeros(len(weight_OI), rank, dtype=metrics.dtype) for weight_OI in weight_EOI]

    def lefts(self) -> list[Tensor]:
        """The left sides in fp32."""
        return [left_Ok.float() for left_Ok in self.left]

    def solve(self, sweeps: int) -> list[float]:
        """The loss after each sweep; what is left afterwards is the best found."""
        self._normalise()
        losses: list[float] = []
        for sweep in range(sweeps):
            gradient_nkI, loss = self._fit_experts()
            losses.append(loss)
            slow = sweep > 0 and losses[-2] - loss <= GAIN * losses[-2]
            if sweep + 1 == sweeps or slow:
                break
            self._fit_bases(gradient_nkI)
            self._normalise()
        return losses

    def _fit_experts(self) -> tuple[Tensor, float]:
        """Best left sides, then mixing weights; (what the bases would gain by, the loss)."""
        gradient_nkI, loss = torch.zeros_like(self.bases_nkI, dtype=torch.float64), 0.0
        for e in range(len(self.weight_EOI)):
            weight_OI, metric = self.weight_EOI[e].to(self.metrics.dtype), self.metrics[e]
            self.left[e] = best_left(weight_OI, self._basis(e), metric)
            if len(self.bases_nkI) > 1:
                self.mix_En[e] += self._mix_step(e, weight_OI, metric)
            error_OI = weight_OI - self.left[e] @ self._basis(e)
            weighed_OI = metric.times(error_OI)
            loss += float((error_OI * weighed_OI).sum(dtype=torch.float64))
            gradient_nkI += self.mix_En[e, :, None, None] * (self.left[e].T @ weighed_OI)
        return gradient_nkI, loss

    def _basis(self, e: int) -> Tensor:
        return torch.einsum("n,nki->ki", self.mix_En[e], self.bases_nkI)

    def _mix_step(self, e: int, weight_OI: Tensor, metric: Metric) -> Tensor:
        """What to add to an expert's mixing weights, by least squares on what is left."""
        left_Ok = self.left[e]
        weighed_nkI = metric.times(self.bases_nkI)
        error_kI = left_Ok.T @ (weight_OI - left_Ok @ self._basis(e))
        gram_nn = (left_Ok.T @ left_Ok @ weighed_nkI).flatten(1) @ self.bases_nkI.flatten(1).T
        gain_n = weighed_nkI.flatten(1) @ error_kI.flatten()
        return solve_positive(gram_nn, gain_n[:, None])[:, 0].to(weight_OI.dtype)

    def _fit_bases(self, gradient_nkI: Tensor) -> None:
        """Conjugate gradients on sum_e (mix_e mix_e') x (A_e' A_e) B H_e, conditioned by the product of the means."""
        inner_Ekk = [left_Ok.T @ left_Ok for left_Ok in self.left]

        def operator(step_nkI: Tensor) -> Tensor:
            total_nkI = torch.zeros_like(step_nkI)
            for e, inner_kk in enumerate(inner_Ekk):
                mixed_kI = torch.einsum("n,nki->ki", self.mix_En[e], step_nkI.to(self.metrics.dtype))
                total_nkI += self.mix_En[e, :, None, None] * self.metrics[e].times(inner_kk @ mixed_kI)
            return total_nkI

        mean_kk = torch.stack(inner_Ekk).sum(0).double() / len(inner_Ekk)
        condition = _conditioner(self.mix_En.double(), mean_kk, self.metrics.pooled)
        steps = CG_STEPS if self.metrics.grams is not None else 1 + CG_STEPS * (len(self.bases_nkI) > 1)
        step_nkI = conjugate_gradients(operator, gradient_nkI, condition, steps)
        self.bases_nkI = self.bases_nkI + step_nkI.to(self.bases_nkI.dtype)

    def _normalise(self) -> None:
        """One change of coordinates for all bases, undone in the left sides: rows of the bases become orthonormal."""
        flat_kN = self.bases_nkI.double().transpose(0, 1)
        gram_kk = torch.einsum("kni,lni->kl", flat_kN, flat_kN)
        lower_kk = factor(gram_kk + 1e-10 * torch.eye(len(gram_kk)).to(gram_kk) * gram_kk.diagonal().mean())
        solved_kN = torch.linalg.solve_triangular(lower_kk, flat_kN.flatten(1), upper=False)
        self.bases_nkI = solved_kN.view_as(flat_kN).transpose(0, 1).to(self.bases_nkI.dtype).contiguous()
        self.left = [left_Ok @ lower_kk.to(left_Ok.dtype) for left_Ok in self.left]


def _started(weight_EOI: Tensor, metrics: Metrics, size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """A basis for each of n runs of experts, which each uses its own group's and, by chance, a little of the others'.

    With its own alone no expert would know what it could gain by another, and sweeps end in worse places.
    """
    experts = len(weight_EOI)
    mix_En = NOISE * torch.randn(experts, size.bases, generator=torch.Generator().manual_seed(seed))
    bases = []
    for n, group in enumerate(torch.arange(experts).tensor_split(size.bases)):
        bases.append(input_basis(weight_EOI[group.to(weight_EOI.device)], metrics.pooled, size.rank))
        mix_En[group, n] += 1
    return torch.stack(bases), mix_En.to(weight_EOI.device)


def _conditioner(mix_En: Tensor, mean_kk: Tensor, pooled: Metric) -> Callable[[Tensor], Tensor]:
    def condition(gradient_nkI: Tensor) -> Tensor:
        divided_nkI = pooled.divide(gradient_nkI.flatten(0, 1)).view_as(gradient_nkI)
        divided_nkI = torch.stack([solve_positive(mean_kk, part_kI) for part_kI in divided_nkI])
        return solve_positive(mix_En.T @ mix_En, divided_nkI.flatten(1)).view_as(divided_nkI)

    return condition
