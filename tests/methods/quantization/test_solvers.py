"""Rounding and GPTQ against naive references in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.quantization.grid import rtn
from moe_compress.methods.quantization.numbers import Integers
from support import naive_quantization as slow
from support.quantized import BITS, correlated, random
from support.slow import each_once, slow_unless

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")

Rounded = tuple[Tensor, Tensor]


def require_same(found: Rounded, expected: Rounded, weight: Tensor, gram: Tensor, often: bool) -> None:
    """The same codes, or as good ones: a tie may fall the other way, and what is behind it in its row with it.

    often: where the largest weight sets the scale, it is a tie itself; of 8 bits, the last is near the arithmetic's.
    """
    same = float((found[0].long() == expected[0]).double().mean())
    new, old = (slow.output_error(weight, slow.dequantized(c, s.double()), gram) for c, s in (found, expected))
    assert found[0].dtype == torch.int8 and same >= (0.96 if often else 0.99)
    assert new == pytest.approx(old, rel=0.05 if often else 0.01)


GRIDS = [(48, 8, torch.float32, "mse"), (40, 40, torch.float32, "max"), (64, 32, torch.bfloat16, "mse")]


@pytest.mark.parametrize(("inputs", "group", "dtype", "clip"), GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_that_of_the_reference(bits, inputs, group, dtype, clip):
    weights, importance = random(2, 12, inputs, seed=1), random(2, inputs, seed=2).exp()
    weights[0, 0], weights[1, 1, :group] = 0, 0
    for weighs in (None, importance):
        codes, scale = rtn(weights, bits, group, dtype, clip, weighs)
        assert scale.dtype == dtype and bool((scale > 0).all()) and bool((codes[weights == 0] == 0).all())
        for b, weight in enumerate(weights):
            expected = slow.rtn(weight, bits, group, dtype, clip, None if weighs is None else weighs[b])
            # Scales as the reference has them: then every code is its code, but for ties.
            again = slow.codes_of(weight.view(-1, group), scale[b].double().flatten(), bits).view(weight.shape)
            tied = ((weight.double() / scale[b].double().repeat_interleave(group, 1)).frac().abs() - 0.5).abs() < 1e-5
            assert torch.equal(codes[b].long()[~tied], again[~tied])
            gram = torch.eye(inputs) if weighs is None or clip == "max" else weighs[b].diag()
            require_same((codes[b], scale[b]), expected, weight, gram, clip == "max" or bits == 8)


few = each_once(BITS, GRIDS)


@pytest.mark.parametrize(
    ("bits", "grid", "act_order"),
    slow_unless(lambda bits, grid, _: few(bits, grid), BITS, GRIDS, [False, True]),
)
def test_gptq_is_that_of_the_paper(bits, grid, act_order):
    inputs, group, dtype, clip = grid
    """Gate and up of two experts, which share their inputs; one input is dead, some weights are zero."""
    x, weights = correlated(2, inputs, 3), [random(2, 9, inputs, seed=4), random(2, 12, inputs, seed=5)]
    x[0, :, 3], weights[0][:, :, ::9] = 0, 0
    gram = x.transpose(1, 2) @ x / x.shape[1]
    keywords = {"clip": clip, "act_order": act_order, "damping": 0.02}
    found, raised = gptq(weights, gram, Integers(bits), group, dtype, ["a", "b"], **keywords)
    assert raised == [] and bool((found[0][0][:, :, ::9] == 0).all())
    for b in range(2):
        both = torch.cat([weight[b] for weight in weights])
        mine = tuple(torch.cat([part[n][b] for part in found]) for n in range(2))
        assert mine[1].dtype == dtype
        expected = slow.gptq(both, gram[b], bits, group, dtype, **keywords)
        require_same(mine, expected, both, gram[b], clip == "max" or bits == 8)


UNEVEN = [(144, 24), (320, 160), (200, 200), (400, 200)]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_inputs_that_are_always_zero_weigh_nothing(size):
    """Neither on the scales of the others nor on the damping, however large these are."""
    rows = random(200, 64, seed=5) * size
    dead = torch.arange(64) % 8 == 3
    rows[:, dead] = 0
    weight, gram = random(1, 16, 64, seed=6), (rows.T @ rows / len(rows))[None]
    ((codes, scale, _),), _ = gptq([weight], gram, Integers(3), 32, torch.float32, ["it"])
    ((alone, _, _),), _ = gptq([weight * ~dead], gram, Integers(3), 32, torch.float32, ["it"])
    live = (codes[..., ~dead] == alone[..., ~dead]).double().mean()
    error = slow.output_error(weight[0], slow.dequantized(codes[0], scale[0].double()), gram[0])
    plain = slow.rtn(weight[0], 3, 32, torch.float32, "mse", gram[0].diagonal())
    assert float(live) > 0.9 and error < slow.output_error(weight[0], slow.dequantized(*plain), gram[0])


@pytest.mark.parametrize(("inputs", "group"), UNEVEN)
def test_groups_that_fit_no_block(inputs, group):
    x, weight = correlated(1, inputs, 6), random(1, 6, inputs, seed=7)
    gram = x.transpose(1, 2) @ x / x.shape[1]
    ((codes, scale, _),), _ = gptq([weight], gram, Integers(3), group, torch.float32, ["it"])
    expected = slow.gptq(weight[0], gram[0], 3, group, torch.float32)
    require_same((codes[0], scale[0]), expected, weight[0], gram[0], often=False)


@pytest.mark.parametrize("bits", [2, 3])
def test_making_up_for_rounding_pays(bits):
    x, weights = correlated(4, 64, 8), random(4, 16, 64, seed=9)
    gram = x.transpose(1, 2) @ x / x.shape[1]
    (solved,), _ = gptq([weights], gram, Integers(bits), 16, torch.float32, list("abcd"))
    rounded = rtn(weights, bits, 16, torch.float32, "mse")
    for b, weight in enumerate(weights):
        pair = [slow.dequantized(codes[b].long(), scale[b]) for codes, scale in (solved[:2], rounded)]
        new, old = (slow.output_error(weight, each, gram[b]) for each in pair)
        assert new < 0.8 * old


def test_damping_is_raised_once_and_said():
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[1, 0, 0] = -0.05  # not definite with a damping of 0.01, definite with 0.1
    assert gptq([random(3, 4, 8)], gram, Integers(4), 8, torch.float32, ["a", "b", "c"])[1] == [1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5.0])
def test_a_gram_matrix_that_nothing_saves(wrong):
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[2, 4, 4] = wrong
    names = [f"expert {e} of layer 7" for e in range(3)]
    with pytest.raises(ValueError, match="the Gram matrix of expert 2 of layer 7 is singular or holds NaN"):
        gptq([random(3, 4, 8)], gram, Integers(4), 8, torch.float32, names)
