"""Low-rank adapters: what is added to a matrix that is held itself (LoRA, arXiv 2106.09685).

M rows and N columns of a matrix as it is stored, R the rank; stacks of matrices have one adapter each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adapter_shapes(shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a matrix [..., M, N]: A [..., R, N] and B [..., M, R]."""
    *stack, rows, columns = shape
    return (*stack, rank, columns), (*stack, rows, rank)


def first_factors(shape: Sequence[int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A drawn evenly from within 1 / sqrt(N), as linear maps begin; B zero, so that nothing is added at first."""
    a_shape, b_shape = adapter_shapes(shape, rank)
    bound = 1 / math.sqrt(a_shape[-1])
    return torch.empty(a_shape).uniform_(-bound, bound, generator=generator), torch.zeros(b_shape)


def low_rank_update(a_RN: Tensor, b_MR: Tensor, scale: float, alive_MN: Tensor | None = None) -> Tensor:
    """What is added, [..., M, N]: scale times B A; nothing where a matrix was pruned (alive is false)."""
    update_MN = (b_MR @ a_RN) * scale
    return update_MN if alive_MN is None else update_MN * alive_MN
