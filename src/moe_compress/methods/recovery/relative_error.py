"""How far rows are from what they should be, relative to that. R rows, D their width, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# The square of a row that is no row at all.
NOTHING = 1e-12


def relative_error(ours_RD: Tensor, theirs_RD: Tensor) -> Tensor:
    """Squared error of each row over the square of what it should be, in fp32, [R]."""
    ours_RD, theirs_RD = ours_RD.float(), theirs_RD.float()
    return (ours_RD - theirs_RD).square().sum(1) / theirs_RD.square().sum(1).clamp_min(NOTHING)


def mean_by_token(value_R: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """The mean of each token's rows, [T]; 0 for one that has none."""
    count_T = torch.bincount(token_R, minlength=tokens).clamp_min(1)
    return value_R.new_zeros(tokens).index_add(0, token_R, value_R) / count_T
