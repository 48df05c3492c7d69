"""Plans of one layer: different points of the budget, the target hit, the error foretold."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.layer_info import get_moe_layer_info
from moe_compress.analysis.layer_plan import CompressedMoEConfig, CompressionPlan
from moe_compress.analysis.strategies import STRATEGIES
from moe_compress.methods.expert_drop import subset_search
from support.planted import FAMILIES, LAYER, PROMPTS, reader
from support.slow import slow_after


@pytest.mark.parametrize("family", slow_after(2, FAMILIES))
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


@pytest.mark.parametrize("family", slow_after(2, FAMILIES))
def test_the_predicted_error_is_that_of_the_reconstruction(family, tokenizer):
    compressor = ExpertCompressor(reader(family), tokenizer)
    compressor.analysis(LAYER, PROMPTS)
    plan = compressor.plan_compression(LAYER, 6)
    assert not plan.merges
    sample = compressor._observed(tuple(PROMPTS))[LAYER].layer.output_sample()
    expected = float(subset_search.subset_losses(sample, [plan.kept_experts]))
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


def test_a_config_with_router_rows_is_short():
    config = CompressedMoEConfig(0, 8, 6, {0: 0}, {})
    assert "router_remap" not in repr(config)
