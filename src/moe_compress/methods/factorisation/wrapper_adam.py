"""Wrappers as the founding document solves them: Adam on the core and all wrappers of a projection at once.

E experts, O outputs, I inputs, r a rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.whitening import Metrics

STEPS = 1000
LR = 1e-3
# Numbers of the experts whose wrapped cores are held at once.
CHUNK = 1 << 24

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def descended(weight_EOI: Tensor, metrics: Metrics, rank: int, settings: Settings) -> tuple[Tensor, Parts, list[float]]:
    """(core, wrappers, the loss before each step): [E, O, r], [E, r, O], [E, I, r], [E, r, I].

    As documented: the core starts as the experts' mean, U as zeros and V as N(0, 1) / sqrt(r), in fp32, 1000 steps of
    rate 1e-3. The last loss is that of what is returned.
    """
    core_OI, parts = _started(weight_EOI, rank, settings.seed)
    # Adam's steps do not depend on the loss's scale as long as gradients are far above its epsilon: in weights' units.
    scale = 1 / float(weight_EOI.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny))
    adam = torch.optim.Adam([core_OI, *parts], lr=LR if settings.lr is None else settings.lr)
    chunk = max(1, CHUNK // weight_EOI[0].numel())
    losses: list[float] = []
    for step in range((STEPS if settings.steps is None else settings.steps) + 1):
        if step:
            adam.step()
        adam.zero_grad()
        losses.append(
            sum(
                _backward(weight_EOI, metrics, core_OI, parts, slice(first, first + chunk), scale)
                for first in range(0, len(weight_EOI), chunk)
            )
        )
    out_left, out_right, in_left, in_right = (part.detach() for part in parts)
    return core_OI.detach(), (out_left, out_right, in_left, in_right), losses


def _started(weight_EOI: Tensor, rank: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The core, and out_left, out_right, in_left, in_right."""
    experts, outputs, inputs = weight_EOI.shape
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for side in (outputs, inputs):
        parts += [
            torch.zeros(experts, side, rank),
            torch.randn(experts, rank, side, generator=generator) / math.sqrt(rank),
        ]
    core_OI = weight_EOI.float().mean(0)
    return core_OI.requires_grad_(), [part.to(weight_EOI.device).requires_grad_() for part in parts]


def _backward(
    weight_EOI: Tensor, metrics: Metrics, core_OI: Tensor, parts: list[Tensor], some: slice, scale: float
) -> float:
    """The loss of some experts, whose gradient is added to core and wrappers."""
    with torch.enable_grad():
        out_left, out_right, in_left, in_right = (part[some] for part in parts)
        inside_EOI = core_OI + (core_OI @ in_left) @ in_right
        around_EOI = inside_EOI + out_left @ (out_right @ inside_EOI)
        error_EOI = weight_EOI[some].float() - around_EOI
    first = some.start
    held_EOI = error_EOI.detach()
    weighed_EOI = torch.stack([metrics[first + e].times(held_EOI[e]) for e in range(len(held_EOI))])
    error_EOI.backward(2 * scale * weighed_EOI)
    return float((held_EOI * weighed_EOI).sum(dtype=torch.float64))
