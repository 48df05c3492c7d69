"""Least squares whose matrix is only known by what it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(operator: Operator, right: Tensor, condition: Operator, steps: int) -> Tensor:
    """x after `steps` steps towards operator(x) = right, from 0: each lowers x' operator(x) / 2 - x' right.

    operator, condition: symmetric and positive; the second near the inverse of the first.
    """
    found, rest = torch.zeros_like(right), right
    direction = conditioned = condition(rest)
    size = (rest * conditioned).sum()
    for step in range(steps):
        image = operator(direction)
        curvature = (direction * image).sum()
        if not bool(curvature > 0) or not bool(size > 0):
            break
        found = found + size / curvature * direction
        if step + 1 == steps:
            break
        rest = rest - size / curvature * image
        conditioned = condition(rest)
        size, before = (rest * conditioned).sum(), size
        direction = conditioned + size / before * direction
    return found
