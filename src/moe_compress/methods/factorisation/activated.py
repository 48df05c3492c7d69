"""Mixtures of bases that pass through an activation, as MoBE's do: gradient steps from the linear solution.

E experts, O outputs, I inputs, k a rank, n bases.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_compress.methods.factorisation.low_rank import best_left
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.structures import ACTIVATIONS, Factors
from moe_compress.methods.factorisation.whitening import Metrics

STEPS = 300
# Of a parameter's own root mean square.
LR = 0.01
# Root mean square of mixed bases at the start: where silu and tanh are all but straight.
START = 0.05


def refined(weight_EOI: Tensor, metrics: Metrics, linear: Factors, settings: Settings) -> tuple[Factors, list[float]]:
    """(the best activated mixture met, the loss before every step): Adam on bases and mix, left sides in closed form.

    The left side is the best one for what the bases have become at every step, so that the loss is a function of bases
    and mix alone. linear: left, bases and mix of the linear solution, from which the steps begin.
    """
    assert linear.bases is not None and linear.mix is not None
    bases_nkI, mix_En = _scaled(linear.bases, linear.mix)
    parameters = [bases_nkI.requires_grad_(), mix_En.requires_grad_()]
    lr = LR if settings.lr is None else settings.lr
    adam = torch.optim.Adam(
        [{"params": [part], "lr": lr * float(part.detach().square().mean().sqrt())} for part in parameters]
    )
    steps = STEPS if settings.steps is None else settings.steps
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    losses: list[float] = []
    best: tuple[Tensor, Tensor] = bases_nkI.detach().clone(), mix_En.detach().clone()
    for step in range(steps + 1):
        adam.zero_grad()
        loss = sum(_backward(weight_EOI, metrics, bases_nkI, mix_En, settings.activation))
        if not losses or loss < min(losses):
            best = bases_nkI.detach().clone(), mix_En.detach().clone()
        losses.append(loss)
        if step < steps:
            adam.step()
            rates.step()
    left = [
        best_left(weight_EOI[e].to(metrics.dtype), basis_kI, metrics[e]).float()
        for e, basis_kI in enumerate(_activated(*best, metrics.dtype, settings.activation))
    ]
    factors = Factors(left=left, right=[], bases=best[0], mix=best[1], activation=settings.activation)
    return factors, losses


def _scaled(bases_nkI: Tensor, mix_En: Tensor) -> tuple[Tensor, Tensor]:
    """The same mixtures up to one factor: each basis takes on its weights' size, all together the size to start at."""
    size_n = mix_En.square().mean(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    mix_En = mix_En / size_n
    bases_nkI = bases_nkI * size_n[:, None, None]
    squares = torch.stack([torch.einsum("n,nki->ki", mix_n, bases_nkI).square().mean() for mix_n in mix_En]).mean()
    return bases_nkI * (START / squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)), mix_En


def _activated(bases_nkI: Tensor, mix_En: Tensor, dtype: torch.dtype, activation: str) -> Iterator[Tensor]:
    """Every expert's activated mixture [k, I]."""
    for mix_n in mix_En:
        with torch.enable_grad():
            activated_kI = ACTIVATIONS[activation](torch.einsum("n,nki->ki", mix_n, bases_nkI)).to(dtype)
        yield activated_kI


def _backward(
    weight_EOI: Tensor, metrics: Metrics, bases_nkI: Tensor, mix_En: Tensor, activation: str
) -> Iterator[float]:
    """The loss of every expert, whose gradient is added to bases and mix."""
    for e, basis_kI in enumerate(_activated(bases_nkI, mix_En, metrics.dtype, activation)):
        weight_OI, metric = weight_EOI[e].to(metrics.dtype), metrics[e]
        left_Ok = best_left(weight_OI, basis_kI.detach(), metric)
        error_OI = weight_OI - left_Ok @ basis_kI.detach()
        weighed_OI = metric.times(error_OI)
        # At the best left side its own gradient is zero: what is left is the bases'.
        basis_kI.backward(-2 * left_Ok.T @ weighed_OI)
        yield float((error_OI * weighed_OI).sum(dtype=torch.float64))
