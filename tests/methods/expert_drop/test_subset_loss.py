"""Losses of kept sets are those of really cut blocks."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.expert_drop.subset_search import best_subset, subset_losses
from moe_compress.models import hf
from moe_compress.models.shape import moe_shapes
from support import tiny
from support.blocks import block_of
from support.output_samples import PADDED, Real, given, outputs_of, probed, real, sets_of
from support.slow import slow_after

ROUTERS = [
    "mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "minimax_m2", "ernie4_5_moe", "jamba",
    "nemotron_h", "v2 groups", "v3 not renormalised",
]  # fmt: skip


@pytest.mark.parametrize("name", slow_after(5, ROUTERS))
def test_losses_are_those_of_really_cut_blocks(name):
    """Routers of several families compute in fp32 whatever the model's dtype; the rest is float64."""
    found = real(name)
    for keep in (6, 4):
        sets = sets_of(found.shape, keep)[::3]
        expected = torch.tensor([found.loss(kept) for kept in sets], dtype=torch.float64)
        assert expected.min() > 1e-2
        torch.testing.assert_close(subset_losses(found.output_sample, sets), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", slow_after(3, ROUTERS))
def test_the_best_set_is_the_best_of_all_cut_blocks(name):
    found = real(name)
    losses = {kept: found.loss(kept) for kept in sets_of(found.shape, 4)}
    choice = best_subset(found.output_sample, found.shape, 4)
    assert choice.kept == min(losses, key=lambda kept: losses[kept]) and choice.exhausted == 0
    assert choice.loss == pytest.approx(losses[choice.kept], rel=1e-6)


@pytest.mark.parametrize("name", slow_after(2, ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"]))
def test_an_observed_sample_gives_the_losses_of_really_cut_blocks(name, family_checkpoint):
    """The engine's fp32 experts and fp32 inner products: a loss is a difference of squares of about its own size."""
    model = tiny.make(name)
    model.set_experts_implementation("eager")
    block = block_of(model.double())
    index = next(i for i, layer in enumerate(hf.decoder_layers(model)) if layer is block.layer)
    experts, (hidden_TD, index_TK, gate_TK) = block.view.experts, given(block)
    target_TD = experts(hidden_TD, index_TK, gate_TK).detach()
    found = Real(block, moe_shapes(model)[0], None, outputs_of(experts, hidden_TD), target_TD)
    sample = probed(family_checkpoint(name), sample=4096, mask=torch.ones_like(PADDED))[index]
    sets = sets_of(found.shape, 6)
    expected = torch.tensor([found.loss(kept) for kept in sets], dtype=torch.float64)
    torch.testing.assert_close(subset_losses(sample, sets), expected, rtol=1e-4, atol=0)
    assert best_subset(sample, found.shape, 6).kept == sets[int(expected.argmin())]
