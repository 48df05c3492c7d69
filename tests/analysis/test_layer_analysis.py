"""What is planted is found, and nothing is said from too little text."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from scipy import stats

from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.in_memory import observe
from moe_compress.analysis.layer_analysis import ROUTED, analyse, design_effect, wilson
from moe_compress.analysis.layer_info import shape_of, view_of
from moe_compress.analysis.similarity import tight_groups
from moe_compress.analysis.strategies import make_plan, strategy_target
from moe_compress.data.documents import DataSpec
from moe_compress.data.windows import FOLDS, make_windows
from support import readers
from support.planted import FAMILIES, LAYER, PROMPTS, plant, reader
from support.slow import slow_after

DOCUMENTED = {
    "num_experts", "merge_candidates", "prune_candidates", "specialist_experts", "generalist_experts",
    "mergeable_groups", "potential_reduction", "max_compression_ratio", "recommended_target",
}  # fmt: skip


@pytest.mark.parametrize("family", slow_after(2, FAMILIES))
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
    index_TK = compressor._observed(tuple(readers.LINES))[LAYER].layer.output_sample().index_TK
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
