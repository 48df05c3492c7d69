"""The ExpertCompressor: what is planted is found, plans do what they say, and nothing is said from too little text."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from transformers import AutoConfig
from typer.testing import CliRunner

import moe_compress
import readers
import tiny
from moe_compress import zoo
from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.in_memory import observe, watched
from moe_compress.analysis.layer_analysis import ROUTED, analyse, design_effect, wilson
from moe_compress.analysis.layer_info import MoEHooks, get_moe_layer_info, shape_of, view_of
from moe_compress.analysis.layer_plan import CompressedMoEConfig, CompressionPlan, ExpertMergeResult
from moe_compress.analysis.similarity import aligned_cosine, tight_groups
from moe_compress.analysis.sizes import estimate_compressed_size, estimate_model_size, print_compression_summary
from moe_compress.analysis.strategies import STRATEGIES, make_plan, strategy_target
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.commands import app, main
from moe_compress.data.documents import DataSpec
from moe_compress.data.prompts import prompt_windows
from moe_compress.data.windows import FOLDS, make_windows
from moe_compress.evaluation.generations import token_overlap
from moe_compress.methods.expert_drop import subset_search
from moe_compress.models import hf
from moe_compress.models.moe import moe_views, permute_neurons
from moe_compress.models.sizes import sizes

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")
PROMPTS = readers.LINES * 4
DOCUMENTED = {
    "num_experts", "merge_candidates", "prune_candidates", "specialist_experts", "generalist_experts",
    "mergeable_groups", "potential_reduction", "max_compression_ratio", "recommended_target",
}  # fmt: skip
LAYER = 2


def reader(family: str, **overrides):
    return tiny.make(family, vocab_size=readers.VOCAB, **overrides)


@torch.no_grad()
def plant(model, layer: int, source: int, copy: int, permuted: bool) -> None:
    """Let one expert hold the weights of another, its neurons perhaps in another order; its router row stays."""
    view = view_of(model, layer)
    for parameter in view.experts.parameters():
        parameter[copy] = parameter[source]
    if permuted:
        order_EF = torch.arange(tiny.INNER).repeat(view.num_experts, 1)
        order_EF[copy] = torch.randperm(tiny.INNER, generator=torch.Generator().manual_seed(copy))
        permute_neurons(view, order_EF)


@pytest.fixture(scope="module")
def tokenizer():
    return readers.tokenizer()


@pytest.fixture(scope="module")
def compressors(tokenizer):
    """family -> a compressor of a model with permuted copies (1 and 2, 5 and 6) in LAYER; not to be changed."""
    made = {}

    def make(family: str) -> ExpertCompressor:
        if family not in made:
            model = reader(family)
            plant(model, LAYER, 1, 2, permuted=True)
            plant(model, LAYER, 5, 6, permuted=True)
            made[family] = ExpertCompressor(model, tokenizer)
            made[family].analysis(LAYER, PROMPTS)
        return made[family]

    return make


@pytest.fixture
def fresh(tokenizer):
    """family -> a compressor of a model of its own, analysed on PROMPTS."""

    def make(family: str, **overrides) -> ExpertCompressor:
        compressor = ExpertCompressor(reader(family, **overrides), tokenizer)
        compressor.analysis(MoEHooks(compressor.model).moe_layer_indices[-1], PROMPTS)
        return compressor

    return make


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# --- what is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_copies_are_found_by_outputs_and_by_weights(family, compressors):
    found = compressors(family).analyze_compression_potential(LAYER, PROMPTS)
    assert found.keys() >= DOCUMENTED
    assert {tuple(pair[:2]) for pair in found["merge_candidates"]} == {(1, 2), (5, 6)}
    for name in ("outputs", "weights"):
        alike = found["similarity"][name]
        assert alike["matrix"][1][2] == pytest.approx(1, abs=1e-4) and alike["n"] > 0
        assert max(row[7] for row in alike["matrix"][:7]) < 0.5
    view = view_of(compressors(family).model, LAYER)
    flat = torch.stack([torch.cat([m[e].flatten() for m in view.stacks().values()]) for e in (1, 2)])
    assert torch.cosine_similarity(flat[:1], flat[1:]) < 0.5  # unaligned, the copy looks like another expert
    assert sorted(map(sorted, found["mergeable_groups"])) == [[1, 2], [5, 6]]
    assert found["potential_reduction"] == 2 and found["recommended_target"] == 6
    assert found["max_compression_ratio"] == pytest.approx(2 / 8) and found["warning"] is None
    assert json.loads(json.dumps(found)) is not None


def test_similarity_by_routed_tokens_is_their_jaccard(compressors):
    compressor = compressors("mixtral")
    compressor = ExpertCompressor(compressor.model, compressor.tokenizer)
    routed = compressor.analysis(LAYER, readers.LINES).similarity["routed"]
    index_TK = compressor._observed(tuple(readers.LINES))[LAYER].layer.probe().index_TK
    both = sum(bool({1, 2} <= set(row)) for row in index_TK.tolist())
    either = sum(bool({1, 2} & set(row)) for row in index_TK.tolist())
    assert routed.matrix[1][2] == pytest.approx(both / either, abs=1e-5) and routed.n == len(index_TK)


def test_a_copy_in_one_router_group_alone_lets_nothing_go(fresh):
    compressor = fresh("deepseek_v3")
    plant(compressor.model, LAYER, 1, 2, permuted=False)
    found = ExpertCompressor(compressor.model, compressor.tokenizer).analysis(LAYER, PROMPTS)
    assert [pair[:2] for pair in found.merge_candidates] == [(1, 2)]
    assert found.potential_reduction == 0 and found.recommended_target == 8


def test_an_expert_that_no_token_reaches_is_a_prune_candidate(tokenizer):
    model = reader("gpt_oss")
    plant(model, LAYER, 3, 4, permuted=False)
    with torch.no_grad():
        view_of(model, LAYER).router.bias[3] = -100
    compressor = ExpertCompressor(model, tokenizer)
    found = compressor.analysis(LAYER, PROMPTS)
    assert found.prune_candidates == [3] and found.reap[3] is None and found.utilization[3] == 0
    assert found.utilization_interval[3][1] < 0.3 * sum(found.utilization) / 8
    assert found.mergeable_groups == []  # its copy is alike, but nobody is both pruned and merged
    assert found.potential_reduction == 1 and found.removal_error[3] == pytest.approx(0, abs=1e-3)
    plan = compressor.plan_compression(LAYER, target_experts=7)
    assert plan.pruned_experts == [3] and plan.estimated_quality_impact == "none"


def test_upcycled_and_native_experts_are_told_apart(tokenizer, compressors):
    model = reader("mixtral")
    view = view_of(model, LAYER)
    with torch.no_grad():
        for parameter in view.experts.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.copy_(parameter[:1] + 0.1 * noise * parameter.std())
    upcycled = ExpertCompressor(model, tokenizer).analysis(LAYER, PROMPTS)
    assert upcycled.moe_type == "pseudo" and upcycled.median_output_similarity > 0.8
    assert max(map(len, upcycled.mergeable_groups)) <= 4
    assert compressors("mixtral").analysis(LAYER, PROMPTS).moe_type == "native"


def test_groups_do_not_chain():
    similarity = torch.eye(4, dtype=torch.float64)
    for i, j, value in ((0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.1)):
        similarity[i, j] = similarity[j, i] = value
    count = torch.arange(4).double()
    assert tight_groups(similarity, count, range(4), 1, 0.6) == [[1, 0]]
    assert tight_groups(similarity, count, range(4), 2, 0.6) is None  # 2 is like 1, but not like 0


# --- what is said, and how surely -------------------------------------------------------------------------------


def test_nothing_is_said_from_79_tokens(tokenizer, compressors):
    compressor = ExpertCompressor(compressors("mixtral").model, tokenizer)
    ids = tokenizer(" ".join(PROMPTS))["input_ids"][:79]
    few = [tokenizer.decode(ids[:40]), tokenizer.decode(ids[40:])]
    found = compressor.analyze_compression_potential(LAYER, few)
    assert found["tokens"] == pytest.approx(79, abs=3)
    assert not any(found[name] for name in DOCUMENTED if "experts" in name and name != "num_experts")
    assert not found["merge_candidates"] and not found["prune_candidates"] and not found["mergeable_groups"]
    assert found["potential_reduction"] == 0 and found["recommended_target"] == 8
    assert f"at least {ROUTED * 8 // 2}" in found["warning"]
    one = compressor.analyze_compression_potential(LAYER, [" ".join(PROMPTS)])
    assert one["tokens"] > ROUTED * 4 and "single window" in one["warning"] and not one["mergeable_groups"]


def test_a_plan_never_rests_on_too_few_tokens(tokenizer, compressors):
    compressor = ExpertCompressor(compressors("mixtral").model, tokenizer)
    compressor.analysis(LAYER, PROMPTS[:1])
    plan = compressor.plan_compression(LAYER, 6)
    assert len(plan.merges) == 2  # the default text was enough
    assert set(compressor._seen) == {tuple(PROMPTS[:1]), ()}


def test_intervals_are_wilson_s():
    low, high = wilson(torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64), 200)
    for i, hits in enumerate((0, 20, 100)):
        expected = stats.binomtest(hits, 200).proportion_ci(0.95, method="wilson")
        assert (float(low[i]), float(high[i])) == pytest.approx((expected.low, expected.high))


def test_the_design_effect_tells_independent_tokens_from_clustered_ones():
    generator = torch.Generator().manual_seed(0)
    token_C = torch.full((2 * FOLDS,), 400.0)
    share_E = torch.full((64,), 1 / 8)
    alone = torch.distributions.Binomial(400, share_E.expand(8, -1))
    torch.manual_seed(0)
    assert design_effect(alone.sample(), token_C) == pytest.approx(1, abs=0.15)
    clusters = (torch.rand(8, 40, 64, generator=generator) < 1 / 8).sum(1) * 10.0  # ten tokens go together
    assert design_effect(clusters, token_C) == pytest.approx(10, rel=0.2)
    one_fold = torch.zeros(4)
    one_fold[0] = 100
    assert design_effect(torch.full((4, 8), 0.0), one_fold) is None


@pytest.fixture(scope="module")
def two_domains(tokenizer, texts):
    """What a model of two domains shows of LAYER, and its shape."""
    model = reader("mixtral")
    spec = DataSpec(source=str(texts / "domains.jsonl"), use="calibration", samples=24, length=24)
    return observe(model, make_windows(spec, tokenizer))[LAYER], shape_of(model, LAYER)


def with_specialist(seen, expert: int):
    """The same, as if the expert were used by half of the tokens of code and hardly by others."""
    by_domain = {name: dict(sums) for name, sums in seen.layer.by_domain.items()}
    for name, share in (("code", 0.5), ("prose", 0.02)):
        count = by_domain[name]["count"].clone()
        count[expert] = share * float(by_domain[name]["tokens"])
        by_domain[name]["count"] = count
    return dataclasses.replace(seen, layer=dataclasses.replace(seen.layer, by_domain=by_domain))


def test_a_layer_of_one_expert(tokenizer):
    compressor = ExpertCompressor(reader("mixtral", num_local_experts=1, num_experts_per_tok=1), tokenizer)
    assert compressor.analysis(LAYER, PROMPTS).removal_error == [pytest.approx(1.0)]


def test_specialists_are_those_of_one_domain(two_domains):
    seen, _ = two_domains
    changed = with_specialist(seen, 4)
    plain, found = (analyse(s.layer, s.count_CE, s.token_C) for s in (seen, changed))
    assert 4 in found.specialist_experts and 4 not in found.generalist_experts
    (best,) = [p for p in found.preferences if p.expert == 4 and p.domain == "code"]
    assert best.low > 2 and best.low < best.ratio < best.high
    assert found.domains == ["code", "prose"] and plain.tokens == 24 * 24
    low, high = wilson(torch.tensor(plain.utilization), plain.tokens / plain.design_effect)
    expected = torch.tensor(plain.utilization_interval).double()
    torch.testing.assert_close(torch.stack([low, high], 1).double(), expected, atol=1e-6, rtol=0)


def test_a_specialist_that_is_hardly_used_is_no_prune_candidate(two_domains):
    seen, _ = two_domains
    by_domain = {
        name: {"tokens": torch.tensor(1e6), "count": torch.full((8,), 250e3).index_fill(0, torch.tensor(4), count)}
        for name, count in (("code", 9e3), ("prose", 10.0))
    }
    count = torch.stack([sums["count"] for sums in by_domain.values()])
    sums = {**seen.layer.sums, "count": count.sum(0), "tokens": torch.tensor(2e6)}
    table_CE = (count / FOLDS).repeat_interleave(FOLDS, 0)
    token_C = torch.full((2 * FOLDS,), 1e6 / FOLDS)
    special = analyse(dataclasses.replace(seen.layer, sums=sums, by_domain=by_domain), table_CE, token_C)
    general = analyse(dataclasses.replace(seen.layer, sums=sums, by_domain={}), table_CE, token_C)
    assert special.specialist_experts == [4] and special.prune_candidates == []
    assert general.specialist_experts == [] and general.prune_candidates == [4]


def test_conservative_keeps_specialists(two_domains):
    seen, shape = two_domains
    weakest = min(range(8), key=analyse(seen.layer, seen.count_CE, seen.token_C).reap.__getitem__)
    found = analyse(with_specialist(seen, weakest).layer, seen.count_CE, seen.token_C)
    assert weakest in found.specialist_experts
    for target in range(7, 3, -1):
        assert weakest not in make_plan(found, shape, target, "conservative").pruned_experts
        assert weakest in make_plan(found, shape, target, "balanced").pruned_experts
    many = dataclasses.replace(found, specialist_experts=[0, 1, 2, 3, 4, 5, 6, 7])
    assert strategy_target(many, shape, "conservative") == 8
    with pytest.raises(ValueError, match="keeps its specialists"):
        make_plan(many, shape, 6, "conservative")


# --- plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_are_different_points_of_the_budget(family, compressors):
    compressor = compressors(family)
    plans = [compressor.plan_compression(LAYER, strategy=name) for name in STRATEGIES]
    kept = [plan.target_num_experts for plan in plans]
    assert kept == ([8, 6, 4] if family == "deepseek_v3" else [7, 6, 4])
    for smaller, larger in zip(plans[1:], plans, strict=False):
        assert smaller.predicted_error > larger.predicted_error
        assert smaller.estimated_memory_reduction > larger.estimated_memory_reduction
    for plan in plans:
        listed = [*plan.kept_experts, *plan.pruned_experts, *(e for m in plan.merges for e in m.members)]
        assert sorted(listed) == list(range(8))
        assert len(plan.kept_experts) + len(plan.merges) == plan.target_num_experts
        assert plan.compression_ratio == plan.target_num_experts / 8 == 1 - plan.estimated_memory_reduction
        info = get_moe_layer_info(compressor.model, LAYER)
        assert plan.params_removed == (8 - plan.target_num_experts) * info.expert_params
    assert {tuple(sorted(m.members)) for m in plans[1].merges} == {(1, 2), (5, 6)} and not plans[1].pruned_experts
    assert all(m.similarity == pytest.approx(1, abs=1e-4) for m in plans[1].merges)


def test_the_target_is_hit_exactly_or_refused(compressors):
    mixtral, grouped = compressors("mixtral"), compressors("deepseek_v3")
    for target in range(2, 9):
        assert mixtral.plan_compression(LAYER, target).target_num_experts == target
    assert mixtral.plan_compression(LAYER, 8).estimated_quality_impact == "none"
    for target, words in ((1, "fewer than the 2 experts"), (9, "has 8 experts"), (0, "has 8 experts")):
        with pytest.raises(ValueError, match=words):
            mixtral.plan_compression(LAYER, target)
    with pytest.raises(ValueError, match=r"2 groups.*possible counts are 4, 6, 8"):
        grouped.plan_compression(LAYER, 5)
    with pytest.raises(ValueError, match=r"unknown strategy 'balance'.*aggressive, balanced, conservative"):
        mixtral.plan_compression(LAYER, strategy="balance")
    with pytest.raises(ValueError, match="unknown weight_blend"):
        mixtral.plan_compression(LAYER, weight_blend="mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_predicted_error_is_that_of_the_reconstruction(family, tokenizer):
    compressor = ExpertCompressor(reader(family), tokenizer)
    compressor.analysis(LAYER, PROMPTS)
    plan = compressor.plan_compression(LAYER, 6)
    assert not plan.merges
    probe = compressor._observed(tuple(PROMPTS))[LAYER].layer.probe()
    expected = float(subset_search.subset_losses(probe, [plan.kept_experts]))
    assert plan.predicted_error == pytest.approx(expected, rel=2e-3)


def test_plans_and_configs_as_json(compressors):
    compressor = compressors("gpt_oss")
    plan = compressor.plan_compression(LAYER, 4)
    again = CompressionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.params_removed == plan.params_removed
    config = compressor.apply_compression(again, LAYER)
    copy = CompressedMoEConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert copy == config and torch.equal(copy.router_remap, config.router_remap)
    assert CompressedMoEConfig.from_json(dataclasses.replace(config, router_remap=None).to_json()).router_remap is None
    for kind in (CompressionPlan, CompressedMoEConfig):
        with pytest.raises(ValueError, match="has the fields"):
            kind.from_json({"layer_idx": 1})
    with pytest.raises(ValueError, match="ExpertMergeResult has the fields"):
        CompressionPlan.from_json({**plan.to_json(), "merges": [{"target_expert": 1}]})


# --- carrying out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_or_not(family, tokenizer, fresh):
    compressor = fresh(family)
    plant(compressor.model, LAYER, 1, 2, permuted=True)
    plant(compressor.model, LAYER, 5, 6, permuted=True)
    compressor = ExpertCompressor(compressor.model, tokenizer)
    compressor.analysis(LAYER, PROMPTS)
    plan, model = compressor.plan_compression(LAYER, 4), compressor.model
    function, before = model.config._experts_implementation, weights_of(model)
    row_ED = view_of(model, LAYER).router_rows_ED.clone()
    config = compressor.apply_compression(plan, LAYER)
    other = compressor.compressed_model([plan])
    assert unchanged(model, before) and model.config._experts_implementation == function
    assert other.model.embed_tokens.weight is model.model.embed_tokens.weight

    assert config == compressor.apply_compression(plan, LAYER, inplace=True)
    view = view_of(model, LAYER)
    assert view.num_experts == view.router_rows == config.compressed_num_experts == 4
    assert torch.equal(view.router_rows_ED, config.router_remap)
    assert set(config.expert_mapping) == set(range(8)) and set(config.expert_mapping.values()) == {-1, 0, 1, 2, 3}
    for merge in plan.merges:
        (new,) = {config.expert_mapping[e] for e in merge.members}
        assert config.merged_from[new] == sorted(merge.members) and new >= 0
        assert torch.equal(view.router_rows_ED[new], row_ED[merge.target_expert])
    assert [e for e, new in config.expert_mapping.items() if new == -1] == plan.pruned_experts != []
    ids = tiny.token_ids()
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    with pytest.raises(ValueError, match="has 4: it was compressed since"):
        compressor.apply_compression(plan, LAYER, inplace=True)
    assert compressor.analysis(LAYER, PROMPTS).num_experts == 4  # measured anew


def test_a_merge_of_copies_with_one_router_row_loses_what_a_dropped_copy_loses(compressors):
    compressor = compressors("mixtral")
    plan = compressor.plan_compression(LAYER, 7)
    (merge,) = plan.merges
    kept = sorted([*plan.kept_experts, merge.target_expert])
    pruned = dataclasses.replace(plan, merges=[], pruned_experts=merge.source_experts, kept_experts=kept)
    assert compressor._judged(pruned, "weighted").predicted_error == pytest.approx(plan.predicted_error, rel=1e-3)


def test_copies_merge_into_what_both_are(compressors):
    compressor = compressors("gpt_oss")
    plan = compressor.plan_compression(LAYER, 6, weight_blend="average")
    config = compressor.apply_compression(plan, LAYER)
    merged = view_of(compressor.compressed_model([plan]), LAYER).experts
    for merge in plan.merges:
        new = config.expert_mapping[merge.target_expert]
        for name, parameter in view_of(compressor.model, LAYER).experts.named_parameters():
            torch.testing.assert_close(dict(merged.named_parameters())[name][new], parameter[merge.target_expert])


@pytest.mark.parametrize(("blend", "shares"), [("average", (1, 1)), ("weighted", (3, 1)), ("dominant", (1, 0))])
def test_blends(blend, shares, tokenizer):
    compressor = ExpertCompressor(reader("qwen3_moe"), tokenizer)
    view = view_of(compressor.model, LAYER)
    before = view.experts.gate_up_proj.detach().clone()
    merge = ExpertMergeResult([4], 2, 0.5, blend, [3.0, 1.0])
    plan = CompressionPlan(8, 7, [merge], [], [0, 1, 3, 5, 6, 7], 1 / 8, "")
    with torch.no_grad():
        (edit,) = compressor._edits(dataclasses.replace(plan, layer_idx=LAYER), LAYER)
    compressor.apply_compression(plan, LAYER, inplace=True)
    order_F = edit.arrays["order"][4].long()
    aligned = before[4][torch.cat([order_F, order_F + tiny.INNER])]
    expected = (shares[0] * before[2] + shares[1] * aligned) / sum(shares)
    torch.testing.assert_close(view_of(compressor.model, LAYER).experts.gate_up_proj[2], expected)
    assert torch.equal(view_of(compressor.model, LAYER).experts.gate_up_proj[3], before[3])


def test_without_a_word_the_blend_that_changes_least_is_taken(tokenizer):
    compressor = ExpertCompressor(reader("mixtral"), tokenizer, similarity_threshold=-1.0)
    compressor.analysis(LAYER, PROMPTS)
    best = compressor.plan_compression(LAYER, 5)
    each = [compressor.plan_compression(LAYER, 5, weight_blend=b) for b in ("average", "weighted", "dominant")]
    assert best.predicted_error == min(plan.predicted_error for plan in each) and len(best.merges) > 0
    assert len({plan.predicted_error for plan in each}) == 3
    similarity = compressor.analysis(LAYER, PROMPTS).outputs_EE
    for merge in best.merges:
        pairs = [float(similarity[i, j]) for i in merge.members for j in merge.members if i < j]
        assert merge.similarity == pytest.approx(min(pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_an_expert_that_goes_get_the_next_best(family, fresh):
    compressor = fresh(family)
    plan = compressor.plan_compression(LAYER, 6)
    probe = compressor._observed(tuple(PROMPTS))[LAYER].layer.probe()
    alive = torch.tensor([e in plan.survivors for e in range(8)])
    index_TK, gate_TK = probe.routing.route(probe.logits_TE, alive)
    compressor.apply_compression(plan, LAYER, inplace=True)
    windows = prompt_windows(PROMPTS, compressor.tokenizer)
    after = observe(compressor.model, windows)[LAYER].layer.probe()
    old = torch.tensor(plan.survivors)[after.index_TK]
    assert old.shape == index_TK.shape  # as many experts a token as before
    expected, found = (i.sort(1).values for i in (index_TK, old))
    assert float((expected == found).all(1).double().mean()) > 0.99
    torch.testing.assert_close(gate_TK.sum(1), after.gate_TK.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", (*FAMILIES, "llama4_text", "phimoe", "granitemoeshared", "hunyuan_v1_moe"))
def test_layers_with_different_counts_still_generate(family, fresh):
    compressor = fresh(family)
    first, *_, second = MoEHooks(compressor.model).moe_layer_indices
    for layer, strategy in ((first, "balanced"), (second, "aggressive")):
        compressor.apply_compression(compressor.plan_compression(layer, strategy=strategy), layer, inplace=True)
    model = compressor.model
    assert [view_of(model, layer).num_experts for layer in (first, second)] == [6, 4]
    ids = tiny.token_ids(2, 6)
    cached, anew = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    )
    assert cached.shape == (2, 14) and torch.equal(cached, anew)


def test_plans_that_do_not_fit_change_nothing(compressors):
    compressor = compressors("deepseek_v3")
    plan, before = compressor.plan_compression(LAYER, 6), weights_of(compressor.model)
    wrong = {
        "was made for layer 2, not for layer 1": (plan, 1),
        "is for 16 experts": (dataclasses.replace(plan, original_num_experts=16), LAYER),
        "must name each of its 8 experts once": (dataclasses.replace(plan, kept_experts=[0, 1]), LAYER),
        "leaves 6 experts, not 5": (dataclasses.replace(plan, target_num_experts=5), LAYER),
        "which must keep equally many": (
            dataclasses.replace(plan, merges=[], kept_experts=[0, 1, 2, 3, 4, 5], pruned_experts=[6, 7]), LAYER,
        ),
    }  # fmt: skip
    for words, (bad, layer) in wrong.items():
        with pytest.raises(ValueError, match=words):
            compressor.apply_compression(bad, layer, inplace=True)
    assert unchanged(compressor.model, before)
    with pytest.raises(ValueError, match="set layer_idx"):
        compressor.compressed_model([dataclasses.replace(plan, layer_idx=None)])


def test_a_second_round_is_saved_behind_the_first(reader_folder, options, tmp_path):
    compressor = ExpertCompressor(reader_folder("mixtral"))
    compressor.analysis(LAYER, PROMPTS)
    compressor.apply_compression(compressor.plan_compression(LAYER, 5), LAYER, inplace=True)
    compressor.analysis(LAYER, PROMPTS)
    path = compressor.save_plan([compressor.plan_compression(LAYER, 3)], tmp_path / "plan")
    compressor.apply_compression(compressor.plan_compression(LAYER, 3), LAYER, inplace=True)
    made = moe_compress.apply(path, **{**options, "eval": False, "out": tmp_path / "out"}).folder
    with torch.no_grad():
        wanted, found = (model(tiny.token_ids()).logits for model in (compressor.model, moe_compress.load(made)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    resident = ExpertCompressor(compressor.model, compressor.tokenizer)  # whose changes are not this one's
    resident.model.config._name_or_path = str(reader_folder("mixtral"))
    with pytest.raises(ValueError, match="save the model as it is, and open that folder"):
        resident.save_plan([], tmp_path / "again")


def test_arguments_of_a_wrong_type_are_named(compressors):
    compressor = compressors("mixtral")
    plan, before = compressor.plan_compression(LAYER, 6), weights_of(compressor.model)
    calls: dict[str, Any] = {
        "plan_compression: target_experts=2.5: input should be a valid integer": lambda c: c.plan_compression(0, 2.5),
        "plan_compression: target_experts='4'": lambda c: c.plan_compression(0, target_experts="4"),
        "plan_compression: strategy=None": lambda c: c.plan_compression(0, strategy=None),
        "plan_compression: layer_idx='0'": lambda c: c.plan_compression("0"),
        "plan_compression: layer_idx=None": lambda c: c.plan_compression(None),
        "analysis: layer_idx=1.0": lambda c: c.analysis(1.0),
        "analysis: test_prompts='hello': 'str' instances": lambda c: c.analysis(0, "hello"),
        r"test_prompts\[1\]=3: input should be a valid string": lambda c: c.analyze_compression_potential(0, ["a", 3]),
        "apply_compression: plan=3": lambda c: c.apply_compression(3, 0),
        "compressed_model: plans=CompressionPlan": lambda c: c.compressed_model(plan),
        r"these plans are for layers \[2, 2\]: one a layer": lambda c: c.compressed_model([plan, plan]),
        r"plans are for layers \[2, 2\]": lambda c: c.save_plan([plan, plan], "nowhere"),
        "ExpertCompressor: model_or_path=None: input should be an instance of": lambda _: ExpertCompressor(None),
        "ExpertCompressor: model_or_path=5": lambda _: ExpertCompressor(5),
        "ExpertCompressor: model_or_path=Linear": lambda _: ExpertCompressor(torch.nn.Linear(2, 2)),
        "similarity_threshold='x'": lambda c: ExpertCompressor(c.model, similarity_threshold="x"),
        "threshold=nan: a cosine": lambda c: ExpertCompressor(c.model, similarity_threshold=float("nan")),
        "ExpertCompressor: tokenizer='t'": lambda c: ExpertCompressor(c.model, "t"),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call(compressor)
    assert unchanged(compressor.model, before)


@pytest.mark.parametrize("value", [None, "x", [[1]], float("nan"), [99, None]])
def test_plans_in_json_of_wrong_types(value, compressors):
    good = compressors("mixtral").plan_compression(LAYER, 6).to_json()
    for key in ("merges", "pruned_experts", "kept_experts", "target_num_experts"):
        with pytest.raises(ValueError, match=r"CompressionPlan: |ExpertMergeResult has"):
            CompressionPlan.from_json({**good, key: value})
    config = compressors("mixtral").apply_compression(CompressionPlan.from_json(good), LAYER).to_json()
    for key in ("expert_mapping", "merged_from", "compressed_num_experts"):
        with pytest.raises(ValueError, match="CompressedMoEConfig"):
            CompressedMoEConfig.from_json({**config, key: value})


def test_layers_that_are_not_there_or_dense(compressors):
    grouped = compressors("deepseek_v3")
    assert MoEHooks(grouped.model).moe_layer_indices == [1, 2]
    with pytest.raises(ValueError, match="layer 0 has no experts; MoE layers: 1, 2"):
        grouped.analyze_compression_potential(0)
    for call in (grouped.analyze_compression_potential, grouped.plan_compression):
        with pytest.raises(ValueError, match="layer 7 is not there: layers are 0 to 2"):
            call(7)
    info = get_moe_layer_info(grouped.model, 1)
    assert (info.num_experts, info.num_experts_per_tok, info.router_groups, info.floor) == (8, 2, 2, 4)
    assert info.has_shared_expert and info.router_scores == "sigmoid" and info.router_params == tiny.HIDDEN
    assert not get_moe_layer_info(compressors("mixtral").model, 1).has_shared_expert
    with pytest.raises(ValueError, match="experts of jetmoe cannot be changed: its attention"):
        ExpertCompressor(tiny.make("jetmoe"))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        ExpertCompressor(grouped.model).analysis(1)


def test_a_model_that_is_training_goes_on_training(tokenizer):
    model = reader("mixtral").train()
    with watched(model):
        assert not model.training
    assert model.training
    compressor = ExpertCompressor(model, tokenizer)
    compressor.analysis(LAYER, PROMPTS)
    compressor.apply_compression(compressor.plan_compression(LAYER, 6), LAYER, inplace=True)
    assert model.training and model.model.embed_tokens.weight.requires_grad


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_sizes_add_up(family):
    model = tiny.make(family)
    found = estimate_model_size(model)
    assert found["total"] == sum(found[part] for part in ("expert", "attention", "embeddings", "other"))
    assert found["total"] == sizes(model, 16, torch.float32).parameters
    experts = sum(p.numel() for view in moe_views(model).values() for p in view.experts.parameters())
    assert found["expert"] == experts and found["attention"] > 0 and found["embeddings"] >= tiny.VOCAB * tiny.HIDDEN


def packed(*shape: int, dtype: torch.dtype = torch.uint8) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def test_gpt_oss_has_19_billion_expert_parameters_however_they_are_stored():
    config = AutoConfig.from_pretrained(zoo.config_path("openai/gpt-oss-20b").parent)
    model = hf.skeleton(config, torch.bfloat16)
    plain = estimate_model_size(model)
    assert plain["expert"] / 1e9 == pytest.approx(19.1, abs=0.05) and plain["total"] / 1e9 == pytest.approx(
        20.9, abs=0.05
    )
    for view in moe_views(model).values():
        for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            del view.experts._parameters[name]
            view.experts.register_parameter(f"{name}_blocks", packed(32, rows, 90, 16))
            view.experts.register_parameter(f"{name}_scales", packed(32, rows, 90))
    assert estimate_model_size(model) == plain
    assert sum(p.numel() for p in model.parameters()) < 0.6 * plain["total"]


def test_codes_of_four_bits_are_parameters_and_their_scales_are_none(compressors):
    model = reader("mixtral")
    before = estimate_model_size(model)["attention"]
    attention = model.model.layers[0].self_attn
    linear = attention.q_proj
    rows, columns = linear.weight.shape
    stored = nn.Module()
    stored.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
    stored.register_buffer("qzeros", torch.zeros(1, rows // 8, dtype=torch.int32))
    stored.register_parameter("scales", nn.Parameter(torch.ones(1, rows)))
    attention.q_proj = stored
    assert estimate_model_size(model)["attention"] == before
    stored = nn.Module()
    stored.register_parameter("weight", packed(rows, columns, dtype=torch.float8_e4m3fn))
    stored.register_parameter("weight_scale_inv", nn.Parameter(torch.ones(1, 1)))
    attention.q_proj = stored
    assert estimate_model_size(model)["attention"] == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_predicted_is_written(family, reader_folder, options, tmp_path):
    compressor = ExpertCompressor(reader_folder(family))
    layers = MoEHooks(compressor.model).moe_layer_indices
    compressor.analysis(layers[0], PROMPTS)
    plans = [compressor.plan_compression(layers[0], 6), compressor.plan_compression(layers[-1], 4)]
    found = estimate_compressed_size(compressor.model, plans)
    path = compressor.save_plan(plans, tmp_path / "plan")
    made = moe_compress.apply(path, **{**options, "eval": False, "out": tmp_path / "out"}).folder
    numbers = sum(t.numel() for file in made.glob("*.safetensors") for t in load_file(file).values())
    assert numbers == pytest.approx(found["compressed_params"], rel=1e-3)
    before = open_checkpoint(reader_folder(family)).bytes
    assert open_checkpoint(made).bytes == pytest.approx(before * (1 - found["reduction_ratio"]), rel=1e-3)
    assert found["original_params"] - found["params_removed"] == found["compressed_params"]
    assert found["expert_params_original"] - found["expert_params_compressed"] == sum(p.params_removed for p in plans)
    ids = tiny.token_ids()
    loaded, live = moe_compress.load(made), compressor.compressed_model(plans)
    torch.testing.assert_close(loaded(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
    for plan in plans:
        compressor.apply_compression(plan, plan.layer_idx, inplace=True)
    assert estimate_model_size(compressor.model)["total"] == found["compressed_params"]


def test_the_summary_is_printed(compressors, capsys):
    compressor = compressors("mixtral")
    plan = compressor.plan_compression(LAYER, 4)
    print_compression_summary(compressor.model, [plan], "my model")
    said = capsys.readouterr().out
    found = estimate_compressed_size(compressor.model, [plan])
    for words in ("my model", f"{found['original_params']:,}", f"{found['compressed_params']:,}", "8 -> 4", "-50.0%"):
        assert words in said
    with pytest.raises(ValueError, match="a layer of its own"):
        estimate_compressed_size(compressor.model, [plan, plan])
    with pytest.raises(ValueError, match="before the plan is applied"):
        estimate_compressed_size(compressor.compressed_model([plan]), [plan])


# --- the guide's quick start, and the commands ------------------------------------------------------------------


def test_the_guide_s_full_example():
    compressor = moe_compress.ExpertCompressor("tiny-mixtral")
    hooks = moe_compress.MoEHooks(compressor.model)
    assert len(hooks.moe_layer_indices) == 5
    for layer_idx in hooks.moe_layer_indices[:2]:
        analysis = compressor.analyze_compression_potential(layer_idx)
        assert analysis["tokens"] == 64 * 256 and analysis["domains"] == ["code", "prose", "tasks"]
        plan = compressor.plan_compression(layer_idx, strategy="balanced")
        config = compressor.apply_compression(plan, layer_idx, inplace=True)
        assert (config.original_num_experts, config.compressed_num_experts) == (8, 6)
    prompt = compressor.tokenizer("def fibonacci(n):", return_tensors="pt")
    assert compressor.model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 5
    with pytest.raises(AttributeError, match="no attribute 'ExpertCompresser'"):
        _ = moe_compress.ExpertCompresser


def test_token_overlap():
    assert token_overlap([1, 2, 3], [1, 2, 3]) == (1.0, 3)
    assert token_overlap([1, 2, 3, 4], [1, 9, 3]) == (0.5, 1)
    assert token_overlap([], []) == (1.0, 0) and token_overlap([], [1]) == (0.0, 0)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["moe-compress", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said.err
    return said.out


def test_the_analyze_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = ("samples=8", "length=64")
    said = command(monkeypatch, capsys, "analyze", "tiny-mixtral", "layers=1,3", *small)
    assert "| 1 " in said and "| 3 " in said and "| 2 " not in said and "512 tokens" in said
    folder = tmp_path / "runs" / "analysis" / "tiny-mixtral"
    pictures = {f"{name}.{kind}" for name in ("utilization", "similarity", "reap", "turns") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == {"analysis.json", *pictures}
    found = json.loads((folder / "analysis.json").read_text())
    assert [layer["layer_idx"] for layer in found["layers"]] == [1, 3] and len(found["streams"]["whole layer"]) == 5
    again = moe_compress.analyze("tiny-mixtral", layers=[3], out=tmp_path / "here", samples=8, length=64)
    assert len(again.files) == 9 and again.layers[0].utilization == found["layers"][1]["utilization"]
    (tmp_path / "prompts.txt").write_text("The capital of France is\n\ndef fibonacci(n):\n")
    few = command(monkeypatch, capsys, "analyze", "tiny-mixtral", "prompts=prompts.txt", "layers=0", "out=few")
    assert "No verdicts: only" in few and (tmp_path / "few" / "reap.png").is_file()


def test_the_compare_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": line}) + "\n" for line in readers.LINES[:3]), encoding="utf-8"
    )
    words = ("--prompts", "prompts.jsonl", "max_tokens=6")
    same = command(monkeypatch, capsys, "compare", "tiny-mixtral", "tiny-mixtral", *words)
    assert same.count("100% of 6 tokens the same") == 3 and "KL (nats): 0.0000" in same
    assert "same top token: 1.0000" in same
    other = command(monkeypatch, capsys, "compare", "tiny-mixtral", "tiny-mixtral-seed1", *words)
    assert "KL (nats): 0.0000" not in other and "before:" in other and "after:" in other
    found = moe_compress.compare("tiny-mixtral", "tiny-mixtral-seed1", max_tokens=4, eval_samples=4)
    assert found.tokens == 4 * 255 and found.text == "zoo" and len(found.generations) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("analyze", "tiny-mixtral", "layers=one"), "numbers of layers are needed"),
        (("analyze", "tiny-mixtral", "layers=9", "samples=4", "length=32"), "layer 9 has no experts; MoE layers: 0, 1"),
        (("analyze", "tiny-mixtral", "prompts=nowhere.txt"), "there is no file of prompts nowhere.txt"),
        (("analyze", "tiny-mixtral", "treshold=1"), "unknown key 'treshold'"),
        (("analyze", "tiny-mixtral", "model=tiny-deepseek"), "without model="),
        (("compare", "tiny-mixtral"), "takes two models"),
        (("compare", "tiny-mixtral", "tiny-mixtral", "max_tokens=many"), "a whole number is needed"),
        (("compare", "tiny-mixtral", "tiny-mixtral", "--prompts", "nowhere.txt"), "there is no file of prompts"),
    ],
)
def test_mistakes_are_one_sentence(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "word"), [("analyze", "layers=3,7"), ("compare", "prompts=FILE")])
def test_help(name, word):
    said = CliRunner().invoke(app, [name, "--help"])
    assert said.exit_code == 0 and word in said.output


def test_experts_of_a_known_angle_have_that_similarity():
    view = view_of(tiny.make("mixtral"), 0)
    one, other = view.expert(0), view.expert(1)
    assert aligned_cosine(one, one) == pytest.approx(1) and aligned_cosine(one, other) < 0.6
    assert aligned_cosine(one, other) == pytest.approx(aligned_cosine(other, one))


def test_prompts_as_windows(tokenizer, tmp_path: Path):
    found = prompt_windows(["a b c", "a"], tokenizer)
    assert len(found) == 2 and found.tokens == int(found.mask_NS.sum()) and found.domains == ("prompts",)
    with pytest.raises(ValueError, match="hold no token"):
        prompt_windows([""], tokenizer)
