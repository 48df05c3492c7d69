"""Routers replayed from their logits: with every expert, and without some, they choose what the real modules choose."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from moe_compress.models import hf
from moe_compress.models.families import family_of, groups_of
from moe_compress.models.hf import RoutedRows
from moe_compress.models.modeling.edit_layer import keep_experts
from moe_compress.models.moe import MoEView, moe_views
from moe_compress.models.router_rule import RouterRule, fit_router_rule, selection_bias

IDS = tiny.token_ids(rows=4, length=12)
# Both keep equally many experts in each half, as two groups need.
SIX, FOUR = (0, 2, 3, 5, 6, 7), (1, 2, 4, 7)
# JetMoE's experts are of another kind (no view of them), PhiMoE's gates are no softmax over experts, and LongCat's
# router also names experts that compute nothing. Llama-4's rule is an ordinary one: it is what the gate multiplies
# that is not, and therefore a probe does not use it (test_reconstruction.py).
NOT_IDENTIFIED = ("phimoe", "longcat_flash", "jetmoe")
IDENTIFIED = tuple(name for name in tiny.CONFIGS if name not in NOT_IDENTIFIED)

SIXTEEN = {"n_routed_experts": 16, "num_experts_per_tok": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "v2 four groups": (
        "deepseek_v2",
        {
            **SIXTEEN,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "v3 four groups": ("deepseek_v3", {**SIXTEEN, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "v3 not renormalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    "qwen3 not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "olmoe renormalised": ("olmoe", {"norm_topk_prob": True}),
    "lfm2 scaled": ("lfm2_moe", {"routed_scaling_factor": 3.0}),
    "one expert": ("mixtral", {"num_experts_per_tok": 1}),
}
RULES = [*IDENTIFIED, *VARIANTS]


@dataclass
class Block:
    """The first MoE block of a model, how it was called, and what its router did."""

    config: Any
    layer: nn.Module
    view: MoEView
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits_TE: Tensor
    index_TK: Tensor
    gate_TK: Tensor

    def identified(self) -> RouterRule | None:
        family, (groups, used) = family_of(self.config), groups_of(self.config)
        return fit_router_rule(
            self.logits_TE,
            self.index_TK,
            self.gate_TK,
            top_k=self.index_TK.shape[1],
            scores=family.router_scores,
            groups=groups,
            groups_used=used,
            group_best=family.min_per_group,
            bias_E=selection_bias(self.view),
        )


@torch.no_grad()
def applied(layer: nn.Module, view: MoEView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Logits, experts and gates of one run of a block, from what its router returns and what its experts are given."""
    seen: dict[str, Any] = {}
    handles = [
        view.router.register_forward_hook(lambda _m, _a, out: seen.update(router=out)),
        view.experts.register_forward_pre_hook(lambda _m, args: seen.update(given=args)),
    ]
    layer.get_submodule(view.names["block"])(*args, **kwargs)
    for handle in handles:
        handle.remove()
    if len(seen["given"]) == 3:
        return seen["router"][0].reshape(-1, seen["router"][0].shape[-1]), *seen["given"][1:]
    scores_TE, logits_TE = seen["router"]
    index_TK = logits_TE.topk(view.block.top_k).indices
    return logits_TE, index_TK, scores_TE.gather(1, index_TK)


@torch.no_grad()
def block_of(model: PreTrainedModel) -> Block | None:
    views = moe_views(model)
    if not views:
        return None
    index, view = next(iter(views.items()))
    layer, calls = hf.decoder_layers(model)[index], []
    hook = view.block.register_forward_pre_hook(lambda _m, a, k: calls.append((a, k)), with_kwargs=True)
    model(IDS, use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    return Block(model.config, layer, view, args, kwargs, *applied(layer, view, args, kwargs))


@functools.cache
def made(name: str) -> Block | None:
    family, overrides = VARIANTS.get(name, (name, {}))
    return block_of(tiny.make(family, **overrides))


def dense(index_TK: Tensor, gate_TK: Tensor, experts: int) -> Tensor:
    """Gates [T, E], zero where an expert is not used."""
    return torch.zeros(len(index_TK), experts, dtype=gate_TK.dtype).scatter_add_(1, index_TK, gate_TK)


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


# --- the rule -------------------------------------------------------------------------------------------------


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
        "deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2", "dots1", "nemotron_h", "afmoe", "lfm2_moe"
    }  # fmt: skip
    assert made("gpt_oss").view.router.bias.abs().max() > 0


# --- the experts function -------------------------------------------------------------------------------------

DISPATCHED = tuple(name for name in tiny.EDITABLE if name != "llama4_text")


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
