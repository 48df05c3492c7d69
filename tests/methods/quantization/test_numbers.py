"""Numbers that weights are rounded to: the least error on offer, against plain loops in float64, and what it gains."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from torch import Tensor

from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.quantization.grid import rtn
from moe_compress.methods.quantization.numbers import (
    AsymmetricIntegers,
    Fp4,
    Fp8,
    Integers,
    Numbers,
    nearest,
    nvfp4_divisor,
)
from moe_compress.models.modeling.bit_packing import dequantized
from support.quantized import correlated, random

LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GROUP = 16
KINDS: dict[str, Numbers] = {
    "asymmetric": AsymmetricIntegers(2),
    "signed": Integers(2),
    "fp8": Fp8(),
    "fp8 blocks": Fp8(outputs=8),
    "nvfp4": Fp4(powers=False),
    "mxfp4": Fp4(powers=True),
}


def values(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    number = codes.double().unflatten(2, (scale.shape[2], -1))
    return ((number if zero is None else number - zero.double().unsqueeze(3)) * scale.double().unsqueeze(3)).flatten(2)


def rounded(kind: str, weight: Tensor, importance: Tensor | None = None, clip: str = "") -> Tensor:
    """What weights become, and checks that every code is the nearest one of its scale."""
    numbers, divisor = KINDS[kind], nvfp4_divisor([weight]) if kind == "nvfp4" else None
    how = clip or ("signed" if kind == "signed" else "mse")
    return values(*nearest(numbers, weight, GROUP, torch.float32, how, importance, divisor))


def best(group: list[float], weighs: list[float], kind: str, offers: list[tuple[float, int]]) -> float:
    """The least weighted squared error of a group of weights over scales and zero points, in plain loops."""

    def error(scale: float, zero: int) -> float:
        if kind in ("nvfp4", "mxfp4"):
            grid = [sign * level * scale for level in LEVELS for sign in (1, -1)]
        else:
            grid = [(code - zero) * scale for code in range(-2, 2)]
        return sum(m * min((w - g) ** 2 for g in grid) for w, m in zip(group, weighs, strict=True))

    return min(error(scale, zero) for scale, zero in offers)


def offers(kind: str, group: list[float], divisor: float) -> list[tuple[float, int]]:
    most, shrinks = max(map(abs, group)), [1 - 0.02 * n for n in range(41)]
    if kind == "mxfp4":
        power = torch.tensor(most / 6).log2().ceil().exp2().item()
        return [(power / 2**n, 0) for n in range(3)]
    if kind == "nvfp4":
        stored = [torch.tensor(most / 6 * s * divisor).to(torch.float8_e4m3fn).double().item() for s in shrinks]
        return [(each / divisor, 0) for each in stored]
    if kind == "signed":
        return [(sign * most / 2 * s, 0) for s in shrinks for sign in (1, -1)]
    low, high = min(0.0, *group), max(0.0, *group)
    return [((high - low) / 3 * s, max(-2, min(1, round(-2 - low * 3 / (high - low))))) for s in shrinks]


@pytest.mark.parametrize("kind", ["asymmetric", "signed", "nvfp4", "mxfp4"])
def test_of_the_scales_on_offer_the_least_error_wins(kind):
    weight, weighs = random(2, 3, 2 * GROUP, seed=1) * 0.1 + 0.02, random(2, 2 * GROUP, seed=2).square()
    found = rounded(kind, weight, weighs)
    divisor = nvfp4_divisor([weight]).tolist()
    for b, o, g in [(b, o, g) for b in range(2) for o in range(3) for g in range(2)]:
        here = slice(g * GROUP, (g + 1) * GROUP)
        group, weigh = weight[b, o, here].tolist(), weighs[b, here].tolist()
        error = float((weighs[b, here] * (found[b, o, here] - weight[b, o, here]) ** 2).sum())
        assert error == pytest.approx(best(group, weigh, kind, offers(kind, group, divisor[b])), rel=1e-4)


def test_fp4_rounds_as_the_library_does():
    grid = torch.linspace(-7, 7, 2801)
    off = grid[(grid.abs() * 4 % 1 - 0.0).abs() > 1e-3]  # not at the middle between two numbers
    ours = Fp4(powers=True).codes(off, torch.ones(()), None)
    assert torch.equal(ours.abs(), FP4_E2M1_DATA.cast_to_fp4(off.clone()).abs())


def test_rows_of_a_block_share_a_scale_and_those_at_the_edge_are_their_own():
    weight = random(2, 20, 2 * GROUP, seed=3)
    codes, scale, _ = nearest(KINDS["fp8 blocks"], weight, GROUP, torch.float32, "max", None, None)
    for first, last in ((0, 8), (8, 16), (16, 20)):
        block = weight[:, first:last].unflatten(2, (2, GROUP))
        assert torch.equal(scale[:, first:last], scale[:, first : first + 1].expand(-1, last - first, -1))
        torch.testing.assert_close(scale[:, first], block.abs().amax((1, 3)) / 448)
    assert float((values(codes, scale, None) - weight).norm() / weight.norm()) < 0.03


def test_zero_points_and_negative_scales_help_where_a_range_is_short():
    """2 bits have one number on one side and two on the other."""
    weight = random(4, 32, 64, seed=4)
    before = dequantized(*rtn(weight, 2, GROUP, torch.float32, "mse"))
    plain, signed, asymmetric = (
        (found - weight).norm() for found in (before, rounded("signed", weight), rounded("asymmetric", weight))
    )
    assert signed < 0.95 * plain and asymmetric < 0.95 * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_and_keeps_zeros(kind, act_order):
    rows, weights = correlated(2, 64, seed=5), [random(2, 24, 64, seed=6), random(2, 16, 64, seed=7)]
    weights[0][:, :, ::5] = 0
    gram = rows.transpose(1, 2) @ rows / rows.shape[1]
    clip = "signed" if kind == "signed" else "mse"
    divisor = nvfp4_divisor(weights) if kind == "nvfp4" else None
    importance = gram.diagonal(dim1=1, dim2=2)
    solved, _ = gptq(
        weights, gram, KINDS[kind], GROUP, torch.float32, ["a", "b"], clip=clip, act_order=act_order, divisor_B=divisor
    )
    for weight, (codes, scale, zero) in zip(weights, solved, strict=True):
        found = values(codes, scale, zero).float()
        plain = values(*nearest(KINDS[kind], weight, GROUP, torch.float32, clip, importance, divisor)).float()
        errors = [float(((each - weight) @ rows.transpose(1, 2)).norm()) for each in (found, plain)]
        assert errors[0] < (0.95 if "fp8" not in kind else 1.0) * errors[1]
        assert bool((found[weight == 0] == 0).all())
        assert codes.dtype == KINDS[kind].code_dtype and scale.shape == (2, weight.shape[1], 4)
