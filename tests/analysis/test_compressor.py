"""The ExpertCompressor carries out what its plans say, and mistakes change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import moe_compress
from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.in_memory import observe, watched
from moe_compress.analysis.layer_info import MoEHooks, get_moe_layer_info, view_of
from moe_compress.analysis.layer_plan import CompressedMoEConfig, CompressionPlan, ExpertMergeResult
from moe_compress.data.prompts import prompt_windows
from support import tiny
from support.planted import FAMILIES, LAYER, PROMPTS, plant, reader
from support.slow import slow_after


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
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


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_tokens_of_an_expert_that_goes_get_the_next_best(family, fresh):
    compressor = fresh(family)
    plan = compressor.plan_compression(LAYER, 6)
    sample = compressor._observed(tuple(PROMPTS))[LAYER].layer.output_sample()
    alive = torch.tensor([e in plan.survivors for e in range(8)])
    index_TK, gate_TK = sample.routing.route(sample.logits_TE, alive)
    compressor.apply_compression(plan, LAYER, inplace=True)
    windows = prompt_windows(PROMPTS, compressor.tokenizer)
    after = observe(compressor.model, windows)[LAYER].layer.output_sample()
    old = torch.tensor(plan.survivors)[after.index_TK]
    assert old.shape == index_TK.shape  # as many experts a token as before
    expected, found = (i.sort(1).values for i in (index_TK, old))
    assert float((expected == found).all(1).double().mean()) > 0.99
    torch.testing.assert_close(gate_TK.sum(1), after.gate_TK.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "family", slow_after(2, ("mixtral", "llama4_text", *FAMILIES[1:], "phimoe", "granitemoeshared", "hunyuan_v1_moe"))
)
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
