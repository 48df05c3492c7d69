"""Experts called one by one, by nobody, and listened to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import moe_views
from support import tiny
from support.blocks import IDS, dense

DISPATCHED = tuple(name for name in tiny.EDITABLE if name not in ("llama4_text", "dbrx"))


def experts_of(family: str, implementation: str) -> Any:
    model = tiny.make(family)
    model.set_experts_implementation(implementation)
    return next(iter(moe_views(model).values())).experts


@pytest.mark.parametrize("family", DISPATCHED)
@torch.no_grad()
def test_ids_that_mean_nobody_are_left_out_as_by_transformers(family):
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(20, tiny.HIDDEN, generator=generator)
    index_TK = torch.randint(0, tiny.EXPERTS + 1, (20, 3), generator=generator)
    index_TK[4] = tiny.EXPERTS
    gate_TK = torch.rand(20, 3, generator=generator).masked_fill(index_TK >= tiny.EXPERTS, 0)
    stock, ours = experts_of(family, "grouped_mm"), experts_of(family, hf.EXPERTS_FUNCTION)
    stock._is_expert_parallel = True
    reported: list[RoutedRows] = []
    hf.tap(nn.Module(), ours, reported.append)
    expected = stock(x_TD, index_TK, gate_TK)
    assert torch.equal(ours(x_TD, index_TK, gate_TK), expected) and (expected[4] == 0).all()
    assert torch.equal(ours(x_TD, index_TK + 5 * (index_TK == tiny.EXPERTS), gate_TK), expected)
    assert (ours(x_TD, torch.full((20, 3), tiny.EXPERTS), gate_TK * 0) == 0).all()
    real = index_TK < tiny.EXPERTS
    rows = reported[0]
    assert len(rows.token_R) == len(rows.output_RD) == len(rows.gate_R) == real.sum()
    assert torch.equal(rows.expert_R, index_TK[real].sort().values)
    torch.testing.assert_close(dense(rows.token_R[None], rows.gate_R[None], 20)[0], gate_TK.sum(1))


def passes(model: PreTrainedModel, heard: list[RoutedRows]) -> int:
    heard.clear()
    with torch.no_grad():
        model(IDS, use_cache=False)
    return len(heard)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_several_listeners_hear_the_same_and_leave_one_by_one(family):
    model = tiny.make(family)
    hf.use_experts_function(model)
    view = next(iter(moe_views(model).values()))
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
    first: list[RoutedRows] = []
    second: list[RoutedRows] = []
    hf.tap(view.block, view.experts, first.append)
    hf.tap(view.block, view.experts, second.append)
    assert passes(model, first) == 1 and first[0] is second[0]
    hf.untap(view.block, view.experts, first.append)
    second.clear()
    assert passes(model, first) == 0 and len(second) == 1
    hf.untap(view.block, view.experts, second.append)
    assert passes(model, second) == 0 and "forward" not in view.block.__dict__
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("family", tiny.EDITABLE)
@torch.no_grad()
def test_all_experts_are_each_expert_alone_and_nobody_hears_of_it(family):
    experts = experts_of(family, hf.EXPERTS_FUNCTION)
    heard: list[RoutedRows] = []
    hf.tap(nn.Module(), experts, heard.append)
    x_TD = torch.randn(7, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    found = hf.all_experts(experts, x_TD)
    assert not heard and found.output_ETD.shape == (tiny.EXPERTS, 7, tiny.HIDDEN)
    assert found.inner_ETF.shape == (tiny.EXPERTS, 7, tiny.INNER)
    if family == "llama4_text":
        expected = experts(x_TD.repeat(tiny.EXPERTS, 1)).view(tiny.EXPERTS, 7, -1)
    else:
        expected = torch.stack([experts(x_TD, torch.full((7, 1), e), torch.ones(7, 1)) for e in range(tiny.EXPERTS)])
        assert len(heard) == tiny.EXPERTS
        torch.testing.assert_close(
            found.inner_ETF, torch.stack([rows.inner_RF for rows in heard]), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(found.output_ETD, expected, rtol=1e-5, atol=1e-6)
