"""Routers replayed from their logits: with every expert, and without some, they choose what the real modules choose."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from moe_compress.models.modeling.edit_layer import keep_experts
from moe_compress.models.moe import MoEView
from moe_compress.models.router_rule import RouterRule, fit_router_rule, selection_bias
from support import tiny
from support.blocks import VARIANTS, Block, applied, block_of, dense, made

# Both keep equally many experts in each half, as two groups need.
SIX, FOUR = (0, 2, 3, 5, 6, 7), (1, 2, 4, 7)
# JetMoE's experts are of another kind (no view of them), PhiMoE's gates are no softmax over experts, and LongCat's
# router also names experts that compute nothing, as ZAYA's does. DeepSeek-V4 scores by the root of a softplus, and
# Inkling's gates are shared with the shared experts. Llama-4's rule is an ordinary one: it is what the gate multiplies
# that is not, and therefore an output sample does not use it (test_output_sample.py).
NOT_IDENTIFIED = ("phimoe", "longcat_flash", "jetmoe", "deepseek_v4", "inkling_text", "zaya")
IDENTIFIED = tuple(name for name in tiny.CONFIGS if name not in NOT_IDENTIFIED)

RULES = [*IDENTIFIED, *VARIANTS]


def cut(block: Block, kept: tuple[int, ...]) -> Tensor:
    """Gates [T, E] of the block with only some experts left, on the same input."""
    layer = copy.deepcopy(block.layer)
    keep_experts(layer, block.view.names, experts=kept)
    names = block.view.names
    parts = (layer.get_submodule(names[name]) for name in ("block", "experts", "router"))
    _, index_TK, gate_TK = applied(layer, MoEView(*parts, names), block.args, block.kwargs)
    return dense(torch.tensor(kept)[index_TK], gate_TK, block.logits_TE.shape[1])


def alive(experts: int, kept: tuple[int, ...]) -> Tensor:
    return torch.zeros(experts, dtype=torch.bool).index_fill_(0, torch.tensor(kept), True)


@pytest.mark.parametrize("name", RULES)
def test_with_every_expert_the_rule_is_the_router(name):
    block = made(name)
    routing, experts = block.identified(), block.logits_TE.shape[1]
    assert routing is not None
    index_TK, gate_TK = routing.route(block.logits_TE, torch.ones(experts, dtype=torch.bool))
    expected = dense(block.index_TK, block.gate_TK, experts)
    torch.testing.assert_close(dense(index_TK, gate_TK, experts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NOT_IDENTIFIED)
def test_where_the_rule_is_of_another_kind_none_is_found(name):
    block = made(name)
    assert block is None or block.identified() is None


@pytest.mark.parametrize("name", RULES)
def test_without_some_experts_the_rule_is_the_cut_router(name):
    """The same holds for masks given token by token, also if they differ between tokens."""
    block = made(name)
    routing, experts = block.identified(), block.logits_TE.shape[1]
    masks = []
    for kept in (
        (SIX, FOUR) if experts == 8 else ((0, 1, 5, 6, 8, 11, 13, 14), (0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 15))
    ):
        masks.append((alive(experts, kept), cut(block, kept)))
        got = dense(*routing.route(block.logits_TE, masks[-1][0]), experts)
        assert (got - dense(block.index_TK, block.gate_TK, experts)).abs().max() > 1e-3
        torch.testing.assert_close(got, masks[-1][1], rtol=1e-5, atol=1e-6)
    tokens = torch.arange(len(block.logits_TE))
    first_T1 = (tokens % 3 == 0)[:, None]
    mixed = routing.route(block.logits_TE, torch.where(first_T1, masks[0][0], masks[1][0]))
    torch.testing.assert_close(
        dense(*mixed, experts), torch.where(first_T1, masks[0][1], masks[1][1]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", IDENTIFIED)
def test_rounding_to_bf16_does_not_hide_the_rule(name):
    block = block_of(tiny.make(name).to(torch.bfloat16))
    routing, exact = block.identified(), made(name).identified()
    assert routing is not None
    assert (routing.renormalised, routing.scores) == (exact.renormalised, exact.scores)
    assert routing.scale == pytest.approx(exact.scale, rel=5e-3)


def test_renormalisation_and_scale_are_found_out():
    found = {name: made(name).identified() for name in RULES}
    assert {name for name in RULES if not found[name].renormalised} == {
        "deepseek_v2", "qwen2_moe", "olmoe", "flex_olmo", "jamba", "llama4_text", "dots1", "v2 groups",
        "v2 four groups", "v3 not renormalised", "qwen3 not renormalised",
    }  # fmt: skip
    scales = {name: found[name].scale for name in ("v3 four groups", "v2 four groups", "lfm2 scaled", "mixtral")}
    assert scales == pytest.approx(
        {"v3 four groups": 2.5, "v2 four groups": 16, "lfm2 scaled": 3, "mixtral": 1}, rel=1e-5
    )


def known(block: Block, **changes: Any) -> RouterRule | None:
    values: dict[str, Any] = {"top_k": 2, "scores": "softmax", "logits_TE": block.logits_TE}
    values |= {"index_TK": block.index_TK, "gate_TK": block.gate_TK}
    return fit_router_rule(**{**values, **changes})


def test_a_rule_that_does_not_fit_is_refused():
    block = made("mixtral")
    assert known(block) is not None
    wrong_gate = block.gate_TK.clone()
    wrong_gate[7, 1] *= 1.01
    assert known(block, gate_TK=wrong_gate) is None
    assert known(block, scores="sigmoid") is None
    assert known(block, bias_E=torch.linspace(0, 3, 8)) is None
    assert known(block, groups=2, groups_used=1, group_best=2) is None
    assert known(block, index_TK=block.index_TK + 8) is None
    assert known(block, top_k=3) is None
    assert known(block, gate_TK=block.gate_TK * torch.nan) is None
    biased = made("deepseek_v3")
    assert biased.identified() is not None
    without = fit_router_rule(
        biased.logits_TE,
        biased.index_TK,
        biased.gate_TK,
        top_k=2,
        scores="sigmoid",
        groups=2,
        groups_used=1,
        group_best=2,
    )
    assert without is None


def test_ties_are_not_held_against_a_rule():
    logits_TE = torch.zeros(5, 4)
    index_TK = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 3], [2, 1]])
    assert fit_router_rule(logits_TE, index_TK, torch.full((5, 2), 0.5), top_k=2, scores="softmax") is not None


def test_what_a_token_cannot_reach_weighs_nothing():
    logits_TE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for scores in ("softmax", "sigmoid"):
        for renormalised in (True, False):
            routing = RouterRule(top_k=3, scores=scores, renormalised=renormalised, scale=2.0)
            two = dense(*routing.route(logits_TE, alive(8, (1, 4))), 8)
            assert (two[:, [0, 2, 3, 5, 6, 7]] == 0).all() and (two[:, [1, 4]] > 0).all()
            assert (dense(*routing.route(logits_TE, torch.zeros(8, dtype=torch.bool)), 8) == 0).all()
    grouped = RouterRule(top_k=3, scores="sigmoid", renormalised=True, groups=2, groups_used=1, group_best=2)
    gates = dense(*grouped.route(logits_TE, alive(8, (0, 1, 4, 5))), 8)
    assert ((gates > 0).sum(1) == 2).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(6))
    # The fifth slot finds nobody in the one group that is used, though the other is whole.
    second = replace(grouped, top_k=5, bias_E=torch.tensor([0.0] * 4 + [9.0] * 4), renormalised=False)
    gates = dense(*second.route(logits_TE, torch.ones(8, dtype=torch.bool)), 8)
    assert (gates[:, :4] == 0).all() and (gates[:, 4:] > 0).all()


@pytest.mark.parametrize("name", ["mixtral", "v3 four groups", "v2 four groups"])
def test_a_rule_survives_being_saved(name):
    routing = made(name).identified()
    stored = load(save(routing.tensors()))
    again = RouterRule.from_tensors(stored["rule"], stored.get("bias"))
    mask = torch.ones(made(name).logits_TE.shape[1], dtype=torch.bool)
    for got, expected in zip(
        again.route(made(name).logits_TE, mask), routing.route(made(name).logits_TE, mask), strict=True
    ):
        assert torch.equal(got, expected)


def test_selection_biases_are_found_and_logit_biases_are_not():
    names = ("e_score_correction_bias", "expert_bias")
    found = set()
    for family in tiny.EDITABLE:
        view = made(family).view
        bias_E = selection_bias(view)
        owned = [*view.block.named_buffers(), *view.block.named_parameters()]
        expected = [tensor for name, tensor in owned if name.endswith(names)]
        assert (bias_E is None) == (not expected), family
        if bias_E is not None:
            found.add(family)
            assert torch.equal(bias_E, expected[0].reshape(-1)) and bias_E.abs().max() > 0
    assert found == {
        "deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2", "dots1", "nemotron_h", "afmoe", "lfm2_moe",
        "exaone_moe", "mimo_v2_flash", "glm_moe_dsa", "hy_v4", "inkling_text", "deepseek_v4",
    }  # fmt: skip
    assert made("gpt_oss").view.router.bias.abs().max() > 0
