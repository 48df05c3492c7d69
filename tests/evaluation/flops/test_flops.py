"""FLOPs and sizes by component: the paper's columns, torch's and fvcore's counters, and edits with known effects."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from moe_compress import zoo
from moe_compress.checkpoints.reader import architecture_values
from moe_compress.checkpoints.resolve import config_folder
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import (
    DropLayer,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    PackMatrices,
    SetTopK,
    SkipExperts,
    SkipSublayer,
)
from moe_compress.evaluation.flops.report import as_markdown, flops
from moe_compress.evaluation.flops.torch_check import check
from moe_compress.models import hf
from moe_compress.models.component_map import (
    EXPERTS,
    MLPS,
    NORMS,
    PROJECTIONS,
    RECURRENT,
    ROUTERS,
    SCANS,
    SCORES,
    SHARED,
    attentions_of,
)
from moe_compress.models.components import components
from moe_compress.models.sizes import sizes
from support import tiny
from support.slow import slow_after, slow_families

MIXTRAL, DEEPSEEK = "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/deepseek-moe-16b-base"
LENGTH = 24
# Recurrent families with a layer of each of their kinds, so that there is a cache to decode with.
MIXED = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "nemotron_h": {"layers_block_type": ["moe", "attention", "mamba"]},
}
SCANNING = ("qwen3_next", "nemotron_h", "jamba", "minimax", "lfm2_moe", "inkling_text", "zaya")
# What mixes their streams is among what is not compared.
STREAMS = ("deepseek_v4", "hy_v4")
# Their attention is estimated.
ESTIMATED = {SCORES, RECURRENT}
ROUGH = ("deepseek_v4", "inkling_text", "zaya")
WITHOUT_SKELETON = ("jetmoe", "longcat_flash")


def skeleton(hub_id):
    return hf.skeleton(hf.config_from(architecture_values(config_folder(hub_id))), torch.bfloat16)


def make(family, **overrides):
    return tiny.make(family, **{**MIXED.get(family, {}), **overrides})


def by_name(model, tokens=LENGTH, context=LENGTH, batch=1, **keywords):
    return {each.name: each for each in components(model, tokens, context, batch, torch.float32, **keywords)}


PAPER = [
    (MIXTRAL, "original", [], "54.4", "86.99"),
    (MIXTRAL, "experts", [KeepExperts(layer, tuple(range(6))) for layer in range(32)], "54.4", "65.99"),
    (MIXTRAL, "layers", [SkipSublayer(layer, "moe") for layer in range(20, 28)], "42.9", "65.99"),
    (MIXTRAL, "blocks", [DropLayer(layer) for layer in range(24, 19, -1)], "46.0", "73.47"),
    (DEEPSEEK, "original", [], "11.7", "30.50"),
    (DEEPSEEK, "experts", [KeepExperts(layer, tuple(range(48))) for layer in range(1, 28)], "11.7", "23.54"),
    (DEEPSEEK, "layers", [SkipSublayer(layer, "moe") for layer in range(20, 24)], "10.6", "26.25"),
    (DEEPSEEK, "blocks", [DropLayer(layer) for layer in range(23, 19, -1)], "10.1", "26.12"),
]


@pytest.mark.parametrize(("hub_id", "what", "edits", "teraflops", "gibibytes"), PAPER)
def test_the_papers_columns_from_configs_alone(hub_id, what, edits, teraflops, gibibytes):
    model = skeleton(hub_id)
    apply_edits(model, edits)
    found = components(model, 2048, 2048, 1, torch.bfloat16)
    assert f"{sum(each.prefill for each in found) / 1e12:.1f}" == teraflops
    assert f"{sum(each.bytes for each in found) / 2**30:.2f}" == gibibytes


def test_torch_agrees_on_a_model_of_full_size():
    model = skeleton(MIXTRAL)
    apply_edits(model, [SkipSublayer(3, "moe"), KeepExperts(4, (0, 1, 5)), SetTopK(5, 1), DropLayer(7)])
    found = check(model, 2048)
    assert {each.phase for each in found} == {"prefill", "decode"}
    assert all(each.agrees and each.compared for each in found if each.component != NORMS)
    assert next(model.parameters()).is_meta and not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("family", slow_families(tiny.CONFIGS))
def test_torchs_counter_agrees(family):
    model = make(family)
    found = check(model, LENGTH)
    compared = {(each.component, each.phase): each for each in found if each.compared}
    assert all(each.difference <= 1e-3 for each in compared.values()), found
    loose = {each.component for each in found if not each.compared and each.analytic} - (
        ESTIMATED if family in ROUGH else set()
    )
    assert loose == ({SCANS} if family in SCANNING else {EXPERTS} if family == "longcat_flash" else set())
    cached = family not in ("inkling_text", "zaya")  # whose convolutions are taken for a state
    assert {("head", "prefill"), *([("head", "decode")] if cached else [])} <= compared.keys()
    if family not in (*SCANNING, *STREAMS, *ROUGH) and not loose:
        analytic = sum(each.analytic for each in found if each.phase == "prefill")
        assert analytic == pytest.approx(sum(each.counted for each in found if each.phase == "prefill"), rel=1e-3)


@pytest.mark.parametrize(
    "family", slow_after(3, ["mixtral", "deepseek_v3", "llama4_text", "gpt_oss", "jamba", "ernie4_5_moe"])
)
def test_a_skeleton_is_enough_for_torchs_counter(family):
    model = make(family)
    counted = [(each.component, each.phase, each.counted) for each in check(model, LENGTH)]
    assert [(e.component, e.phase, e.counted) for e in check(model.to("meta"), LENGTH)] == counted


@pytest.mark.parametrize("family", WITHOUT_SKELETON)
def test_experts_that_run_on_weights_alone_say_so(family):
    with pytest.raises(ValueError, match=f"cannot count {family} without weights"):
        check(make(family).to("meta"), LENGTH)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_implementation_is_counted_alike(experts, attention):
    model = make("qwen3_moe")
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    assert all(each.agrees for each in check(model, LENGTH))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v2", "glm4_moe"]))
def test_fvcore_agrees(family):
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    model = make(family)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    analysis = FlopCountAnalysis(Logits(model), tiny.token_ids(1, LENGTH))
    multiply_adds = sum(
        analysis.unsupported_ops_warnings(False).by_operator()[op] for op in ("linear", "matmul", "bmm")
    )
    assert 2 * multiply_adds == pytest.approx(sum(each.prefill for each in by_name(model).values()), rel=1e-3)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_components_add_up_to_the_sizes(family):
    model = make(family)
    found, whole = by_name(model).values(), sizes(model, LENGTH, torch.float32)
    assert sum(each.parameters for each in found) == whole.parameters
    assert sum(each.bytes for each in found) == whole.bytes
    assert sum(each.prefill for each in found) == whole.flops_per_token * LENGTH


def test_components_of_a_known_model():
    found = by_name(make("deepseek_v2"))
    hidden, inner = tiny.HIDDEN, tiny.INNER
    assert found[EXPERTS].parameters == 2 * tiny.EXPERTS * 3 * hidden * inner
    assert found[EXPERTS].prefill == LENGTH * 2 * tiny.TOP_K * 2 * 3 * hidden * inner
    assert found[SHARED].parameters == 2 * 3 * hidden * 2 * inner
    assert found[MLPS].parameters == 3 * hidden * 48
    assert found[ROUTERS].parameters == 2 * hidden * tiny.EXPERTS
    assert found[SCORES].prefill == 3 * LENGTH**2 * 4 * (16 + 8) * 2
    assert found[NORMS].prefill == found["embedding"].prefill == 0


def test_batches_multiply_and_context_is_the_decode_steps():
    model = make("mixtral")
    one, four = by_name(model), by_name(model, batch=4, context=2 * LENGTH)
    assert four[EXPERTS].prefill == 4 * one[EXPERTS].prefill and four[EXPERTS].bytes == one[EXPERTS].bytes
    assert four[SCORES].decode == 8 * one[SCORES].decode
    assert four[PROJECTIONS].decode == 4 * one[PROJECTIONS].decode


def test_windows_hold_decode_down_but_not_prefill():
    model, full = make("gpt_oss"), make("mixtral")
    assert [each.window for each in attentions_of(model)] == [16, None, 16]
    narrow, wide = by_name(model, 64, 64)[SCORES], by_name(full, 64, 64)[SCORES]
    assert narrow.prefill == wide.prefill
    assert narrow.decode * 3 * 64 == wide.decode * (16 + 64 + 16)


def test_scans_are_flagged_as_estimates():
    found = by_name(make("qwen3_next"))
    assert found[SCANS].estimate and not found[RECURRENT].estimate
    convolution, state = 2 * 64 * 4, 7 * 4 * 8 * 8
    assert found[SCANS].decode == 2 * (convolution + state)
    assert by_name(make("mixtral"))[SCANS].prefill == 0


def changed(family, *edits):
    model = make(family)
    before = by_name(model)
    apply_edits(model, edits)
    return before, by_name(model), model


def test_fewer_experts_weigh_less_and_compute_the_same():
    groups, weights = ((0, 1), (2, 3), (4,), (5,), (6,), (7,)), ((1.0, 1.0), (1.0, 1.0), *[(1.0,)] * 4)
    edits = [KeepExperts(0, (0, 2, 5)), MergeExperts(1, groups, weights, "sum")]
    before, after, model = changed("mixtral", *edits)
    each = before[EXPERTS].parameters // (3 * tiny.EXPERTS)
    assert after[EXPERTS].parameters == (3 + 6 + 8) * each
    assert after[EXPERTS].prefill == before[EXPERTS].prefill
    assert before[ROUTERS].parameters - after[ROUTERS].parameters == 5 * tiny.HIDDEN
    assert all(each.agrees for each in check(model, LENGTH))


def test_layers_of_their_own_top_k_and_skipped_experts_count_on_average():
    before, after, model = changed("mixtral", SetTopK(0, 3), SkipExperts(1, 0.5, True, active=1.25))
    assert after[EXPERTS].prefill * 3 * tiny.TOP_K == before[EXPERTS].prefill * (3 + 1.25 + 2)
    assert after[EXPERTS].estimate and not before[EXPERTS].estimate
    assert all(each.agrees for each in check(model, LENGTH))


def test_what_is_removed_costs_nothing():
    before, after, model = changed("qwen2_moe", SkipSublayer(0, "attention"), SkipSublayer(1, "moe"))
    for name in (PROJECTIONS, SCORES, EXPERTS, SHARED, ROUTERS):
        assert 3 * after[name].prefill == 2 * before[name].prefill, name
    assert after[SCORES].decode * 3 == before[SCORES].decode * 2
    assert all(each.agrees for each in check(model, LENGTH))


def test_narrow_experts_of_their_own_widths():
    widths = (8, 16) * (tiny.EXPERTS // 2)
    kept = torch.arange(16, dtype=torch.int32).expand(tiny.EXPERTS, -1)
    edits = [KeepChannels(layer, 16, widths, arrays={"channels": kept}) for layer in range(tiny.LAYERS)]
    before, after, _ = changed("mixtral", *edits)
    assert after[EXPERTS].parameters * 2 == before[EXPERTS].parameters
    assert after[EXPERTS].prefill * 2 == before[EXPERTS].prefill


def test_packed_experts_weigh_their_bits_and_compute_the_same():
    names = [f"mlp.experts.{part}" for part in ("gate", "up", "down")]
    bits, spans = {name: (4,) * tiny.EXPERTS for name in names}, dict.fromkeys(names, 8)
    before, after, model = changed("mixtral", *(PackMatrices(layer, bits, spans) for layer in range(tiny.LAYERS)))
    assert after[EXPERTS].parameters == before[EXPERTS].parameters
    assert after[EXPERTS].prefill == before[EXPERTS].prefill
    assert after[EXPERTS].bytes == before[EXPERTS].parameters * (4 / 8 + 4 / 8)  # codes, and a scale for 8 of them
    assert after[EXPERTS].bytes * 4 == before[EXPERTS].bytes
    with pytest.raises(ValueError, match="without weights"):
        check(model.to("meta"), LENGTH)


def test_report_of_a_known_hub_id(tmp_path):
    report = flops(MIXTRAL, tokens="512", context=4096, batch=2)
    saved = json.loads(report.save(tmp_path).read_text(encoding="utf-8"))
    assert (tmp_path / "Mixtral-8x7B-v0.1.json").is_file()
    assert json.loads(json.dumps(report.to_json())).items() <= saved.items()
    assert saved["total"]["parameters"] == 46_702_792_704 and saved["check"] is None and report.agrees is None
    assert report.markdown() == as_markdown(saved)
    assert "| routed experts" in report.markdown() and "recurrent" not in report.markdown()


@pytest.mark.parametrize("model", slow_after(1, ["tiny-deepseek", "openai/gpt-oss-20b"]))
def test_report_with_torchs_counter(model):
    report = flops(model, tokens=32, check="true")
    assert report.agrees and "agrees to 0.1 %" in report.markdown()
    assert "GiB" in report.markdown() or report.total("bytes") < 2**30


def test_checking_goes_on_with_weights_where_a_skeleton_cannot_run(family_folder):
    report = flops(family_folder("jetmoe"), tokens=16, check=True)
    assert report.agrees and report.check is not None


def test_report_names_what_disagrees():
    found = flops("tiny-mixtral", tokens=16, check=True).to_json()
    found["check"][0] |= {"agrees": False, "difference": 0.25}
    assert f"differs from ours: {found['check'][0]['component']} (prefill)" in as_markdown(found)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("tiny-mixtrl", {}, "Did you mean 'tiny-mixtral'"),
        ("tiny-mixtral", {"tokens": 0}, "tokens=0: a whole number from 1 up is needed"),
        ("tiny-mixtral", {"context": "long"}, "context=long: a whole number is needed"),
        ("tiny-mixtral", {"batch": -1}, "batch=-1"),
        ("tiny-mixtral", {"check": "perhaps"}, "check=perhaps: allowed: true, false"),
    ],
)
def test_bad_input_is_one_sentence(model, options, said):
    with pytest.raises(ValueError, match=said):
        flops(model, **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_local_experts": -3}, "says num_local_experts=-3: no mixtral model is like that"),
        ({"num_attention_heads": 0}, "says num_attention_heads=0: no mixtral model is like that"),
        ({"vocab_size": -1}, "says vocab_size=-1"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(changes, said, tmp_path):
    values = json.loads((zoo.path("tiny-mixtral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError, match=said):
        flops(tmp_path)


def test_the_window_of_chunked_attention_is_that_of_the_layer(family_folder):
    report = flops(family_folder("llama4_text"), tokens=12, check=True)
    assert report.agrees


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        flops(tmp_path)
