"""Mistakes that other compression tools shipped, and how this one would be caught if it made them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.calibration.artefact import Calibration, calibrate
from moe_compress.calibration.collect import observed
from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.data.windows import Windows
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import MergeExperts, Plan
from moe_compress.edits.plan_file import read_plan
from moe_compress.engine import forward
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.methods.expert_drop import scores
from moe_compress.methods.expert_merge import grouping, similarity
from moe_compress.methods.score_registry import scores as known_scores
from moe_compress.models.moe import moe_views
from moe_compress.recipes.parser import parse
from support import readers, tiny
from support.editing import logits_of
from support.slow import slow_after
from support.tiny import CPU, windows_of

TEXT = tiny.token_ids(8, 16, seed=4)


def calibrated(model: Any, place: Path, windows: Windows | None = None) -> tuple[Calibration, ModelStatistics]:
    """One pass over a tiny model, read back from disk, and what a method is given of it."""
    checkpoint = open_checkpoint(tiny.save(model, place / "model"))
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    windows = windows_of(TEXT) if windows is None else windows
    calibrate(checkpoint, layers, windows, place / "sums.safetensors", "", None, output_samples=True)
    read = dataclasses.replace(
        Calibration.load(place / "sums.safetensors"), output_samples=place / "sums-probes.safetensors"
    )
    return read, observed(checkpoint, read, {})


def planned(model: ModelStatistics, sentence: str) -> Plan:
    name, *words = sentence.split()
    method = registry.find(name)
    return method.run(model, **method.bind(dict(word.split("=") for word in words)))


def routed_through(model: Any, layer: int, ids: Tensor = TEXT) -> list[tuple[Tensor, Tensor]]:
    """(experts, gates) [T, K] that really reach the experts of one layer."""
    found: list[tuple[Tensor, Tensor]] = []
    view = moe_views(model)[layer]
    handle = view.experts.register_forward_pre_hook(lambda _m, args: found.append((args[1], args[2])))
    logits_of(model, ids)
    handle.remove()
    return found


# 1. A shipped script misspells its clustering, and another one is run without a word.
@pytest.mark.parametrize("word", ["grouping=hirarchical", "linkage=avrage", "by=output", "preset=hcsmoe"])
def test_1_a_misspelt_clustering_is_no_other_clustering(word):
    with pytest.raises(ValueError, match=word.partition("=")[2]):
        parse(f"expert_merge {word}")
    with pytest.raises(ValueError, match="linkage=avrage: allowed"):
        grouping.hierarchical(torch.zeros(4, 4), 2, linkage="avrage", weight_E=torch.ones(4))


# 2. Complete linkage that merges the farthest pair: two tight pairs gave [0, 0, 1, 0].
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_2_every_linkage_finds_two_tight_pairs(linkage):
    place_E = torch.tensor([0.0, 10.0, 0.1, 10.1])
    distance_EE = (place_E[:, None] - place_E).abs()
    groups = grouping.hierarchical(distance_EE, 2, linkage=linkage, weight_E=torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert groups == ((0, 2), (1, 3))


# 3. Usage counted from two experts a token, though the model uses four.
def test_3_usage_counts_all_experts_of_a_token(tmp_path):
    model = tiny.make("qwen2_moe", num_experts_per_tok=4)
    _, seen = calibrated(model, tmp_path)
    for layer in seen.layers:
        assert layer.sums["count"].sum() == 4 * TEXT.numel()
    used_E = torch.bincount(torch.cat([index.flatten() for index, _ in routed_through(model, 0)]), minlength=8)
    assert seen.layers[0].sums["count"].tolist() == used_E.tolist()
    merged = planned(seen, "expert_merge preset=hc_smoe keep=4").edits[0]
    assert [list(w) for g, w in zip(merged.groups, merged.weights, strict=True)] == [
        [float(used_E[e]) for e in group] for group in merged.groups
    ]


# 4. A TypeError after saving, so that the evaluation in the same run never starts.
@pytest.mark.parametrize(
    "sentence", slow_after(2, ["expert_drop keep=6", "expert_merge keep=6 router=sum", "layer_drop", "skip"])
)
def test_4_a_run_ends_with_its_evaluation(sentence, reader_folder, options):
    result = moe_compress.compress(sentence, model=reader_folder("mixtral"), **options)
    assert result.record is not None and result.record.metrics["perplexity"].value > 0
    assert (Path(str(options["results"])) / "records" / f"{result.record.name}.json").is_file()


# 5. A router's bias tested by its truth value.
@pytest.mark.parametrize("sentence", ["expert_drop keep=6", "expert_merge keep=6", "expert_merge keep=6 router=sum"])
def test_5_a_router_bias_goes_with_its_rows(sentence, reader_folder, options):
    folder = moe_compress.compress(sentence, model=reader_folder("gpt_oss"), **{**options, "eval": False}).folder
    rows = 8 if "sum" in sentence else 6
    views = moe_views(load_model(folder, torch.float32))
    assert {len(view.router.bias) for view in views.values()} == {rows} == {view.router_rows for view in views.values()}
    assert all(len(view.experts.gate_up_proj_bias) == 6 for view in views.values())


# 6. A row of the table of layers with experts taken for a layer's number, off by the dense layers before them.
def test_6_super_experts_are_found_in_their_own_layer(tmp_path):
    model = tiny.make("deepseek_v2", num_hidden_layers=5, first_k_dense_replace=2)
    with torch.no_grad():
        model.model.layers[3].mlp.experts.down_proj[5] *= 300
    _, seen = calibrated(model, tmp_path)
    plan = planned(seen, "expert_drop keep=4 protect=super score=frequency")
    assert plan.report["protected"] == {3: [5]}
    assert sorted(plan.scores) == [2, 3, 4] == [edit.layer for edit in plan.edits]
    assert 5 in next(edit for edit in plan.edits if edit.layer == 3).experts


# 7. (TIES moves away from the other experts.) What exists here moves towards them.
def test_7_a_merged_expert_lies_between_its_members():
    model = tiny.make("mixtral")
    before = moe_views(model)[0].experts.down_proj.detach().clone()
    apply_edits(
        model, [MergeExperts(0, ((0, 1), *((e,) for e in range(2, 8))), ((1.0, 3.0), *[(1.0,)] * 6), "centroid")]
    )
    merged = moe_views(model)[0].experts.down_proj[0]
    whole = (before[0] - before[1]).norm()
    assert (merged - before[0]).norm() / whole == pytest.approx(0.75, abs=1e-5)
    assert (merged - before[1]).norm() / whole == pytest.approx(0.25, abs=1e-5)


# 8. Scores that are offered but no longer recorded, which is noticed after the calibration.
def test_8_every_score_that_is_offered_can_be_had_from_one_pass(tmp_path):
    _, seen = calibrated(tiny.make("mixtral"), tmp_path)
    for score in known_scores():
        plan = planned(seen, f"expert_drop score={score} keep=5")
        assert [len(edit.experts) for edit in plan.edits] == [5, 5, 5], score
        assert score == "naee" or all(len(values) == 8 for values in plan.scores.values())


# 9. A script that evaluates another folder than the one written, and passes words that nothing reads.
def test_9_what_is_evaluated_is_what_was_written_and_no_word_is_ignored(reader_folder, options, tmp_path):
    out = tmp_path / "somewhere"
    result = moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **{**options, "out": out})
    assert result.folder == out
    with torch.no_grad():
        total = sum(p.numel() for p in load_model(out).parameters())
    assert result.record.sizes["parameters"] == total
    for word in ("perserve_super_experts=true", "singleton_super_experts=true"):
        with pytest.raises(ValueError, match="unknown key"):
            parse(f"expert_drop {word}")


# 10. Softmax and top-k of raw logits for routers that use a sigmoid, a selection bias, groups.
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "nemotron_h", "minimax_m2", "lfm2_moe"])
def test_10_gates_are_those_that_the_model_applied(family, tmp_path):
    model = tiny.make(family, seed=3)
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.copy_(torch.linspace(-0.5, 0.5, 8))  # so that the bias decides
    _, seen = calibrated(model, tmp_path)
    layer = seen.layers[0]
    applied_E = torch.zeros(8, dtype=torch.float64)
    for index, gate in routed_through(model, layer.shape.layer):
        applied_E.index_add_(0, index.flatten(), gate.flatten().double())
    torch.testing.assert_close(layer.sums["gate"], applied_E, rtol=1e-5, atol=1e-6)
    softmax_E = layer.output_sample().logits_TE.softmax(-1)
    top = softmax_E.topk(2, dim=1)
    wrong_E = torch.zeros(8).index_add_(0, top.indices.flatten(), top.values.flatten())
    assert (wrong_E - applied_E).abs().max() > 0.05 * applied_E.max()


# 11. Two paths, of which one renormalises whatever the model says.
@pytest.mark.parametrize("renormalised", [True, False])
def test_11_both_ways_to_measure_agree_on_the_gates(renormalised, options, tmp_path):
    folder = readers.save_model("olmoe", tmp_path / "model", norm_topk_prob=renormalised)
    words = {**options, "eval": False, "model": folder}
    found = []
    for propagate in ("original", "compressed"):
        made = moe_compress.compress(f"expert_drop keep=5 score=gate_mass propagate={propagate}", **words).folder
        found.append(read_plan(made / "plan.json")[0][0].plan.scores[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert (sum(found[0]) == pytest.approx(8 * 16, rel=1e-4)) is renormalised


# 12. A count that is an unbound variable in one path, and is "to keep" in the help but "to prune" in the code.
def test_12_counts_are_kept_and_ratios_are_removed(reader_folder, options):
    words = {**options, "eval": False, "model": reader_folder("mixtral")}
    by_count = moe_compress.compress("expert_drop keep=6", **words).folder
    by_ratio = moe_compress.compress("expert_drop ratio=0.25", **words).folder
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (by_count, by_ratio)]
    assert [plan["stages"][0].pop("given") for plan in plans] == [
        {"score": "reap", "keep": 6}, {"score": "reap", "ratio": 0.25}
    ]  # fmt: skip
    assert plans[0] == plans[1]
    assert {view.num_experts for view in moe_views(load_model(by_count)).values()} == {6}


def in_domains(ids: Tensor = TEXT) -> Windows:
    """Windows of two domains, in turn."""
    windows = windows_of(ids)
    domain_N = torch.arange(len(ids)) * 2 // len(ids)
    return dataclasses.replace(windows, domain_N=domain_N, domains=("code", "prose"))


# 13. Of several categories only the last one's statistics are read back.
def test_13_every_domain_is_read_back(tmp_path):
    read, seen = calibrated(tiny.make("mixtral"), tmp_path, in_domains())
    for layer in seen.layers:
        parts = [layer.by_domain[name]["count"] for name in ("code", "prose")]
        assert [float(part.sum()) for part in parts] == [
            TEXT.numel(),
            TEXT.numel(),
        ]  # half the tokens, two experts each
        assert torch.equal(parts[0] + parts[1], layer.sums["count"]) and not torch.equal(*parts)
    assert read.domains == ("code", "prose")


# 14. The distance of an already pairwise matrix taken for that of router logits, averaged over batches; and a linkage
# called average that is not weighted by the clusters' sizes.
def test_14_logits_are_compared_directly(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 16)
    _, seen = calibrated(tiny.make("mixtral"), tmp_path)
    layer = seen.layers[0]
    logits_TE = layer.output_sample().logits_TE.double()
    assert len(logits_TE) == TEXT.numel()
    unit_TE = logits_TE / logits_TE.norm(dim=0)
    got_EE = similarity.logit_cosine(layer.sums["logit_gram"])
    torch.testing.assert_close(got_EE, unit_TE.T @ unit_TE, rtol=1e-5, atol=1e-6)


def test_14_average_linkage_counts_members():
    """Between {0, 1, 2} and 3: (6 + 6 + 9) / 3 = 7, but ((6 + 6) / 2 + 9) / 2 = 7.5 without counting; 3 to 4 is 7.2."""
    distance_EE = torch.tensor(
        [[0, 1, 2, 6, 99], [1, 0, 2, 6, 99], [2, 2, 0, 9, 99], [6, 6, 9, 0, 7.2], [99, 99, 99, 7.2, 0]]
    )
    assert grouping.hierarchical(distance_EE, 2, weight_E=torch.arange(5.0, 0, -1)) == ((0, 1, 2, 3), (4,))


# 16. The largest activation instead of the largest in absolute value.
def test_16_large_negative_activations_are_large(tmp_path):
    model = tiny.make("mixtral", num_hidden_layers=4)
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        experts.down_proj[5].copy_(-experts.down_proj[5].abs() * 300)
        experts.gate_up_proj[5, : tiny.INNER].mul_(0.1)
        experts.gate_up_proj[5, tiny.INNER :].copy_(
            experts.gate_up_proj[5, : tiny.INNER]
        )  # silu(x) * x is not negative
    _, seen = calibrated(model, tmp_path)
    largest = seen.layers[1].sums["max"]
    assert int(largest.argmax()) == 5
    outputs = seen.layers[1].output_sample().mean_ED[5]
    assert (outputs <= 0).all()
    assert planned(seen, "expert_drop protect=super").report["protected"] == {1: [5]}


# 17. Gates multiplied twice; means over batches, of which those without tokens count as zero.
def test_17_saliency_is_linear_in_the_gate(tmp_path):
    """What enters the first layer with experts does not depend on their scale."""
    found = []
    for scale in (1.0, 2.0):
        model = tiny.make("deepseek_v2", routed_scaling_factor=scale)
        found.append(calibrated(model, tmp_path / str(scale))[1].layers[0].sums)
    torch.testing.assert_close(scores.reap(found[1]), 2 * scores.reap(found[0]), rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(scores.man(found[1]), scores.man(found[0]), rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("sentence", ["expert_drop keep=5", "expert_merge preset=m_smoe keep=4", "layer_drop", "skip"])
def test_17_19_nothing_is_averaged_over_or_begun_anew_with_batches(sentence, tmp_path, monkeypatch):
    """19: a similarity overwritten by each batch, frequencies normalised within each."""
    plans = []
    for tokens in (16, 4096):
        monkeypatch.setattr(forward, "TOKENS_PER_BATCH", tokens)
        plans.append(planned(calibrated(tiny.make("mixtral"), tmp_path / str(tokens))[1], sentence))
    assert plans[0].edits == plans[1].edits
    for layer, values in plans[0].scores.items():
        assert values == pytest.approx(plans[1].scores[layer], rel=1e-4)


# 18. All experts of a layer copied for every look at one of them.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"])
def test_18_looking_at_an_expert_copies_nothing(family):
    view = next(iter(moe_views(tiny.make(family)).values()))
    stored = {p.untyped_storage().data_ptr() for p in view.experts.parameters()}
    expert = view.expert(3)
    looked_at = [t for t in (expert.gate, expert.up, expert.down, expert.up_bias, expert.down_bias) if t is not None]
    assert len(looked_at) >= 2 and {t.untyped_storage().data_ptr() for t in looked_at} <= stored


# 20. Mixed domains by an undefined variable, and a number of experts that is ignored.
def test_20_domains_are_mixed_and_the_count_is_kept(reader_folder, options, texts):
    words = {**options, "eval": False, "model": reader_folder("mixtral"), "data": str(texts / "domains.jsonl")}
    found = {}
    for mix in ("prose:1", "code:1", "prose:3,code:1"):
        folder = moe_compress.compress("expert_drop score=easy_ep keep=5", mix=mix, **words).folder
        (stage,), _ = read_plan(folder / "plan.json")
        assert [len(edit.experts) for edit in stage.plan.edits] == [5, 5, 5]
        found[mix] = torch.tensor([stage.plan.scores[layer] for layer in range(3)])
    mixed = 3 * found["prose:1"] + found["code:1"]  # both domains have as many tokens
    torch.testing.assert_close(found["prose:3,code:1"] / found["prose:3,code:1"].sum(), mixed / mixed.sum())
