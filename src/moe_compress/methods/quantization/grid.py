"""Signed integer grids: which scale a group of weights gets, and which code each weight.

A weight is code * scale; codes of b bits are -2^(b-1) to 2^(b-1) - 1. B experts, O outputs, I inputs, G groups of
inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Clip = Literal["mse", "max", "signed"]
BITS = (2, 3, 4, 8)
# Scales that are tried for a group: the full range times 1, 0.98, ..., 0.2.
SHRINKS = 41
SHRINK_STEP = 0.02
# After so many of them, groups that cannot do better any more are left out: with more bits, most cannot soon.
CHECKED = {2: (), 3: (24, 30), 4: (12, 17, 22), 8: (3, 6)}
WORTHWHILE = 0.8
# Weights that are tried together: their buffers stay in a processor's cache.
PIECE = 1 << 18


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_scale(
    weight_YGR: Tensor, bits: int, dtype: torch.dtype, clip: Clip, importance_YG: Tensor | None = None
) -> Tensor:
    """The scale of every group of G weights, fp32 [Y, R], rounded to `dtype`; groups are the columns of [Y, G, R].

    clip=max: the largest weight is just within reach; mse: what makes the least squared error over the group, with
    each input's error times its importance. Goes through the weights in pieces that stay in the cache.
    """
    full_YR = weight_YGR.abs().amax(1) / (2 ** (bits - 1) - 0.5)
    full_YR = torch.where(full_YR > 0, full_YR, 1.0)
    if clip == "max":
        return stored_scale(full_YR, dtype)
    weighs_YG = weight_YGR.new_ones(weight_YGR.shape[:2]) if importance_YG is None else importance_YG.float()
    scale_YR = torch.empty_like(full_YR)
    count, size, rows = weight_YGR.shape
    # A GPU is given everything at once: what it lacks is not cache, but time for small steps.
    many, columns = (count, rows) if weight_YGR.is_cuda else (1, max(1, PIECE // size))
    for y in range(0, count, many):
        for start in range(0, rows, columns):
            here = slice(y, y + many), slice(start, start + columns)
            piece_YGR = weight_YGR[here[0], :, here[1]].contiguous()
            scale_YR[here] = _searched(piece_YGR, full_YR[here], bits, dtype, weighs_YG[here[0]])
    return scale_YR


def _searched(weight_YGR: Tensor, full_YR: Tensor, bits: int, dtype: torch.dtype, weighs_YG: Tensor) -> Tensor:
    """The first of the shrunken scales with the least error, [Y, R].

    What a scale cuts off is more with every smaller one: groups for which that alone is too much are done, exactly.
    """
    best_YR, least_YR = full_YR, torch.full_like(full_YR, torch.inf)
    found_YR, live_R = full_YR.clone(), torch.arange(full_YR.shape[1], device=full_YR.device)
    off_YGR = torch.empty_like(weight_YGR)
    low, high = code_range(bits)
    for n in range(SHRINKS):
        if n in CHECKED[bits]:
            scale_Y1R = stored_scale(full_YR * (1 - SHRINK_STEP * n), dtype).unsqueeze(1)
            torch.abs(weight_YGR, out=off_YGR).add_(low * scale_Y1R).relu_().square_()
            open_R = (torch.bmm(weighs_YG.unsqueeze(1), off_YGR).squeeze(1) < least_YR).any(0)
            share = float(open_R.float().mean())
            if share < WORTHWHILE:
                found_YR[:, live_R] = best_YR
                live_R, weight_YGR = live_R[open_R], weight_YGR[:, :, open_R]
                full_YR, best_YR, least_YR = full_YR[:, open_R], best_YR[:, open_R], least_YR[:, open_R]
                off_YGR = torch.empty_like(weight_YGR)
            if not share:
                break
        scale_YR = stored_scale(full_YR * (1 - SHRINK_STEP * n), dtype)
        scale_Y1R = scale_YR.unsqueeze(1)
        torch.div(weight_YGR, scale_Y1R, out=off_YGR)
        off_YGR.round_().clamp_(low, high).mul_(scale_Y1R).sub_(weight_YGR).square_()
        error_YR = torch.bmm(weighs_YG.unsqueeze(1), off_YGR).squeeze(1)
        better_YR = error_YR < least_YR
        best_YR, least_YR = torch.where(better_YR, scale_YR, best_YR), torch.where(better_YR, error_YR, least_YR)
    found_YR[:, live_R] = best_YR
    return found_YR


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be stored, but never zero."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal).float()


def rounded_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes, in fp32."""
    return (weight / scale).round_().clamp_(*code_range(bits))


def rtn(
    weight_BOI: Tensor, bits: int, group: int, dtype: torch.dtype, clip: Clip, importance_BI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [B, O, I] and scales [B, O, G], every weight rounded to the nearest (round to nearest, RTN)."""
    experts, outputs, inputs = weight_BOI.shape
    groups = inputs // group
    weight_YGR = (
        weight_BOI.float().reshape(experts, outputs, groups, group).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    )
    importance = None if importance_BI is None else importance_BI.float().reshape(experts * groups, group)
    scale_YR = group_scale(weight_YGR, bits, dtype, clip, importance)
    codes_YGR = rounded_codes(weight_YGR, scale_YR.unsqueeze(1), bits).to(torch.int8)
    codes_BOI = codes_YGR.view(experts, groups, group, outputs).permute(0, 3, 1, 2).reshape(weight_BOI.shape)
    return codes_BOI, scale_YR.view(experts, groups, outputs).transpose(1, 2).to(dtype).contiguous()
