"""Low-rank adapters beside one entry at a time in float64, and beside peft."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_compress.methods.recovery.low_rank import adapter_shapes, first_factors, low_rank_update
from support.pruned import random


def test_each_matrix_of_a_stack_is_moved_by_its_own_factors():
    a, b = random(3, 2, 5, seed=1), random(3, 4, 2, seed=2)
    alive = random(3, 4, 5, seed=3) > 0
    found = low_rank_update(a, b, 0.7, alive)
    for e in range(3):
        for m in range(4):
            for n in range(5):
                entry = 0.7 * sum(float(b[e, m, r]) * float(a[e, r, n]) for r in range(2)) if alive[e, m, n] else 0.0
                assert float(found[e, m, n]) == pytest.approx(entry, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_nothing_is_added_at_first(shape):
    a, b = first_factors(shape, 2, torch.Generator().manual_seed(0))
    assert (tuple(a.shape), tuple(b.shape)) == adapter_shapes(shape, 2) and a.shape[-1] == 6 and b.shape[-2] == 4
    assert not bool(b.any()) and bool(a.any()) and float(a.abs().max()) <= 6**-0.5


def test_it_is_what_peft_adds():
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = plain[0].weight.detach().clone()
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    theirs = next(each for each in model.modules() if hasattr(each, "lora_A"))
    factors = (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    assert [tuple(each.shape) for each in factors] == list(adapter_shapes((4, 6), 2))
    a, b = random(2, 6, seed=1).requires_grad_(), random(4, 2, seed=2).requires_grad_()
    for factor, value in zip(factors, (a, b), strict=True):
        factor.data.copy_(value)
    x = random(5, 6, seed=3)
    output = x @ (weight + low_rank_update(a, b, 6 / 2)).T
    torch.testing.assert_close(output, model(x))
    output.square().sum().backward()
    model(x).square().sum().backward()
    for factor, value in zip(factors, (a, b), strict=True):
        torch.testing.assert_close(value.grad, factor.grad)
    with torch.no_grad():
        torch.testing.assert_close(weight + low_rank_update(a, b, 6 / 2), model.merge_and_unload()[0].weight)
