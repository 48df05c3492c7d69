"""Signed integer grids: which scale a group of weights gets, and which code each weight.

A weight is code * scale; codes of b bits are -2^(b-1) to 2^(b-1) - 1. B experts, O outputs, I inputs, G groups of
inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Clip = Literal["mse", "max"]
BITS = (2, 3, 4, 8)
# Scales that are tried for a group: the full range times 1, 0.98, ..., 0.2.
SHRINKS = 41
SHRINK_STEP = 0.02


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_scale(
    weight: Tensor, bits: int, dtype: torch.dtype, clip: Clip, dim: int, importance: Tensor | None = None
) -> Tensor:
    """The scale of every group, which lies along `dim` (kept, with one entry), in fp32, rounded to `dtype`.

    clip=max: the largest weight is just within reach; mse: what makes the least squared error over the group, with
    each input's error times its importance.
    """
    full = weight.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 0.5)
    full = torch.where(full > 0, full, 1.0)
    best = _rounded(full, dtype)
    if clip == "max":
        return best
    least = _error(weight, best, bits, dim, importance)
    for n in range(1, SHRINKS):
        scale = _rounded(full * (1 - SHRINK_STEP * n), dtype)
        error = _error(weight, scale, bits, dim, importance)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be stored, but never zero."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal).float()


def _error(weight: Tensor, scale: Tensor, bits: int, dim: int, importance: Tensor | None) -> Tensor:
    off = (rounded_codes(weight, scale, bits) * scale - weight).square_()
    return (off if importance is None else off.mul_(importance)).sum(dim, keepdim=True)


def rounded_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes, in fp32."""
    return (weight / scale).round_().clamp_(*code_range(bits))


def rtn(
    weight_BOI: Tensor, bits: int, group: int, dtype: torch.dtype, clip: Clip, importance_BI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [B, O, I] and scales [B, O, G], every weight rounded to the nearest (round to nearest, RTN)."""
    weight_BOGI = weight_BOI.float().unflatten(2, (-1, group))
    importance = None if importance_BI is None else importance_BI.float().unflatten(1, (1, -1, group))
    scale_BOG1 = group_scale(weight_BOGI, bits, dtype, clip, 3, importance)
    codes_BOI = rounded_codes(weight_BOGI, scale_BOG1, bits).flatten(2).to(torch.int8)
    return codes_BOI, scale_BOG1.squeeze(3).to(dtype)
