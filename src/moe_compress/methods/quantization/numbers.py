"""Which numbers weights are rounded to: whole ones with or without a zero point, FP8, FP4; and how scales are found.

A weight is (code - zero point) * scale. B experts, O outputs, I inputs, G groups of inputs (or the inputs of one), Y
groups, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_compress.methods.quantization.grid import (
    PIECE,
    SHRINK_STEP,
    SHRINKS,
    Clip,
    code_range,
    group_scale,
    rounded_codes,
    stored_scale,
)

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E4M3, E4M3_MAX, E4M3_LEAST, E2M1_MAX = torch.float8_e4m3fn, 448.0, 2.0**-9, 6.0
# The least power of two that is a normal number in fp32, and the largest that E8M0 has.
LEAST_POWER, LARGEST_POWER = -126.0, 127.0
Offer = tuple[Tensor, Tensor | None]


class Numbers(Protocol):
    """What codes may be. code_dtype: that holds them; outputs: that share a scale."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def code_dtype(self) -> torch.dtype:
        """Of codes in memory."""

    @property
    def outputs(self) -> int:
        """Rows of a block that share a scale."""

    @property
    def own_scales(self) -> bool:
        """Whether scales are held in fp32, for they are no numbers of the model's dtype."""

    def scales(
        self, weight_YGR: Tensor, dtype: torch.dtype, clip: Clip, weighs_YG: Tensor | None, divisor_Y: Tensor | None
    ) -> Offer:
        """Scales fp32 [Y, R], as they will be stored, and zero points [Y, R], None for numbers without.

        weighs_YG: of each input's error; divisor_Y: what divides scales of E4M3.
        """

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in fp32."""


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers from -2^(b-1) to 2^(b-1) - 1. signed (clip=signed): scales may be negative."""

    bits: int
    code_dtype: torch.dtype = torch.int8
    outputs: int = 1
    own_scales: bool = False

    def scales(
        self, weight_YGR: Tensor, dtype: torch.dtype, clip: Clip, weighs_YG: Tensor | None, divisor_Y: Tensor | None
    ) -> Offer:
        """Of one sign, or of that which leaves the least error: the longer side of the range is then where it helps."""
        if clip != "signed":
            return group_scale(weight_YGR, self.bits, dtype, clip, weighs_YG), None

        def offers(piece_YGR: Tensor, _: Tensor | None) -> Iterator[Offer]:
            full_YR = _whole(piece_YGR.abs().amax(1) / -code_range(self.bits)[0])
            for shrink in _shrinks():
                scale_YR = stored_scale(full_YR * shrink, dtype)
                yield scale_YR, None
                yield -scale_YR, None

        return least_error(self, weight_YGR, offers, weighs_YG, divisor_Y)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in fp32."""
        return rounded_codes(weight, scale, self.bits)


@dataclass(frozen=True, slots=True)
class AsymmetricIntegers:
    """The same with a zero point, so that a group's range may lie to either side; zero itself is always a code."""

    bits: int
    code_dtype: torch.dtype = torch.int8
    outputs: int = 1
    own_scales: bool = False

    def scales(
        self, weight_YGR: Tensor, dtype: torch.dtype, clip: Clip, weighs_YG: Tensor | None, divisor_Y: Tensor | None
    ) -> Offer:
        """Scales that reach both ends of the group, or less far where that leaves the least error."""
        low, high = code_range(self.bits)

        def offers(piece_YGR: Tensor, _: Tensor | None) -> Iterator[Offer]:
            least_YR, most_YR = piece_YGR.amin(1).clamp_max(0), piece_YGR.amax(1).clamp_min(0)
            full_YR = _whole((most_YR - least_YR) / (high - low))
            for shrink in _shrinks() if clip != "max" else (1.0,):
                scale_YR = stored_scale(full_YR * shrink, dtype)
                yield scale_YR, (low - shrink * least_YR / scale_YR).round().clamp_(low, high)

        return least_error(self, weight_YGR, offers, weighs_YG, divisor_Y)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in fp32."""
        assert zero is not None
        return (weight / scale).round_().add_(zero).clamp_(*code_range(self.bits))


@dataclass(frozen=True, slots=True)
class Fp8:
    """E4M3, with one scale for `outputs` rows."""

    outputs: int = 1
    bits: int = 8
    code_dtype: torch.dtype = E4M3
    own_scales: bool = False

    def scales(
        self, weight_YGR: Tensor, dtype: torch.dtype, clip: Clip, weighs_YG: Tensor | None, divisor_Y: Tensor | None
    ) -> Offer:
        """Scales within an octave of the largest weight: where numbers lie that evenly, more would cut off alone."""

        def offers(piece_YGR: Tensor, _: Tensor | None) -> Iterator[Offer]:
            full_YR = _whole(piece_YGR.abs().amax(1) / E4M3_MAX)
            for eighth in range(8) if clip != "max" else (0,):
                yield stored_scale(full_YR * 2 ** (eighth / 8), dtype), None

        return least_error(self, weight_YGR, offers, weighs_YG, divisor_Y)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in fp32."""
        return (weight / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).float()


@dataclass(frozen=True, slots=True)
class Fp4:
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, of both signs. powers: scales are powers of two (MXFP4), else E4M3 (NVFP4).

    NVFP4's scales are divided by one number more, for a whole matrix.
    """

    powers: bool
    bits: int = 4
    code_dtype: torch.dtype = E4M3
    outputs: int = 1
    own_scales: bool = True

    def scales(
        self, weight_YGR: Tensor, dtype: torch.dtype, clip: Clip, weighs_YG: Tensor | None, divisor_Y: Tensor | None
    ) -> Offer:
        """Scales that reach the largest weight, or less far where that leaves the least error."""

        def offers(piece_YGR: Tensor, divisor_Y: Tensor | None) -> Iterator[Offer]:
            full_YR = _whole(piece_YGR.abs().amax(1) / E2M1_MAX)
            if self.powers:
                exponent_YR = full_YR.log2().ceil()
                for lower in (0, 1, 2) if clip != "max" else (0,):
                    yield (exponent_YR - lower).clamp(LEAST_POWER, LARGEST_POWER).exp2(), None
                return
            assert divisor_Y is not None
            over_Y1 = divisor_Y.unsqueeze(1)
            for shrink in _shrinks() if clip != "max" else (1.0,):
                stored_YR = (full_YR * shrink * over_Y1).clamp(E4M3_LEAST, E4M3_MAX).to(E4M3).float()
                yield stored_YR / over_Y1, None

        return least_error(self, weight_YGR, offers, weighs_YG, divisor_Y)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in fp32."""
        scaled = weight / scale
        levels = torch.tensor(E2M1_LEVELS, device=weight.device)
        nearest = torch.bucketize(scaled.abs(), torch.tensor(E2M1_BOUNDS, device=weight.device))
        return torch.copysign(levels[nearest], scaled)


class Offers(Protocol):
    """Scales (and zero points) that are worth trying for a piece of the weights."""

    def __call__(self, piece_YGR: Tensor, divisor_Y: Tensor | None, /) -> Iterator[Offer]: ...  # noqa: D102


def least_error(
    numbers: Numbers, weight_YGR: Tensor, offers: Offers, weighs_YG: Tensor | None, divisor_Y: Tensor | None
) -> Offer:
    """Of the scales (and zero points) on offer for each group those with the least squared error, [Y, R].

    Goes through the weights in pieces that stay in the cache; the first of equals wins.
    """
    count, size, rows = weight_YGR.shape
    scale_YR = weight_YGR.new_empty(count, rows)
    zero_YR = torch.zeros_like(scale_YR)
    weighs_YG = weight_YGR.new_ones(count, size) if weighs_YG is None else weighs_YG.float()
    any_zero = False
    many, columns = (count, rows) if weight_YGR.is_cuda else (max(1, PIECE // (size * rows)), max(1, PIECE // size))
    for y in range(0, count, many):
        groups = slice(y, y + many)
        for start in range(0, rows, columns):
            here = groups, slice(start, start + columns)
            piece_YGR = weight_YGR[groups, :, here[1]].contiguous()
            least_YR = torch.full_like(piece_YGR[:, 0], torch.inf)
            for scale, zero in offers(piece_YGR, None if divisor_Y is None else divisor_Y[groups]):
                wide = None if zero is None else zero.unsqueeze(1)
                code_YGR = numbers.codes(piece_YGR, scale.unsqueeze(1), wide)
                value_YGR = (code_YGR if wide is None else code_YGR - wide) * scale.unsqueeze(1)
                off_YGR = value_YGR.sub_(piece_YGR).square_()
                error_YR = torch.bmm(weighs_YG[groups].unsqueeze(1), off_YGR).squeeze(1)
                better_YR = error_YR < least_YR
                least_YR = torch.where(better_YR, error_YR, least_YR)
                scale_YR[here] = torch.where(better_YR, scale, scale_YR[here])
                if zero is not None:
                    any_zero = True
                    zero_YR[here] = torch.where(better_YR, zero, zero_YR[here])
    return scale_YR, zero_YR if any_zero else None


def _whole(full_YR: Tensor) -> Tensor:
    """Full scales, one for groups of zeros."""
    return torch.where(full_YR > 0, full_YR, 1.0)


def _shrinks() -> Iterator[float]:
    return (1 - SHRINK_STEP * n for n in range(SHRINKS))


def nvfp4_divisor(weights: list[Tensor]) -> Tensor:
    """What divides the scales of the B matrices of each stack, so that the largest scale is E4M3's largest: [B].

    One for all stacks, since kernels run gate and up as one matrix.
    """
    most_B = torch.stack([weight.float().abs().flatten(1).amax(1) for weight in weights]).amax(0)
    return nvfp4_full(most_B)


def nvfp4_full(most_B: Tensor) -> Tensor:
    """What divides scales so that numbers up to this one are reached by the largest of both."""
    return E4M3_MAX * E2M1_MAX / torch.where(most_B > 0, most_B, 1.0)


def found_scales(
    numbers: Numbers,
    weight_BOI: Tensor,
    group: int,
    dtype: torch.dtype,
    clip: Clip,
    weighs_BI: Tensor | None,
    divisor_B: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scales fp32 [B, O, G] and zero points of all groups of a stack; rows that share one repeat it."""
    experts, outputs, inputs = weight_BOI.shape
    groups, shared = inputs // group, numbers.outputs
    blocks = math.ceil(outputs / shared)
    padded = torch.nn.functional.pad(weight_BOI.float(), (0, 0, 0, blocks * shared - outputs))
    weight_YgR = padded.view(experts, blocks, shared, groups, group).permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    weighs_Yg = None
    if weighs_BI is not None:
        weighs_Yg = weighs_BI.float().reshape(experts * groups, 1, group).expand(-1, shared, -1).flatten(1)
    divisor_Y = None if divisor_B is None else divisor_B.repeat_interleave(groups)
    found = numbers.scales(weight_YgR.contiguous(), dtype, clip, weighs_Yg, divisor_Y)
    scale_BOG, zero_BOG = (
        None
        if each is None
        else each.view(experts, groups, blocks).transpose(1, 2).repeat_interleave(shared, 1)[:, :outputs]
        for each in found
    )
    assert scale_BOG is not None
    return scale_BOG, zero_BOG


def nearest(
    numbers: Numbers,
    weight_BOI: Tensor,
    group: int,
    dtype: torch.dtype,
    clip: Clip,
    weighs_BI: Tensor | None,
    divisor_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [B, O, I], scales fp32 and zero points [B, O, G], every weight rounded to the nearest."""
    scale_BOG, zero_BOG = found_scales(numbers, weight_BOI, group, dtype, clip, weighs_BI, divisor_B)
    weight_BOGg = weight_BOI.float().unflatten(2, (-1, group))
    zero = None if zero_BOG is None else zero_BOG.unsqueeze(3)
    codes_BOGg = numbers.codes(weight_BOGg, scale_BOG.unsqueeze(3), zero)
    return codes_BOGg.flatten(2).to(numbers.code_dtype), scale_BOG, zero_BOG
