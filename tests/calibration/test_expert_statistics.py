"""What one pass records of routed experts equals the naive float64 reference, and does not depend on how it was cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_compress.calibration.weight_statistics import weight_sums
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward as fold_module
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.expert_drop import scores
from moe_compress.methods.score_registry import scores as registered
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES
from moe_compress.models.moe import MoEView
from support import naive, tiny
from support.expert_statistics import CPU, IDS, PADDED, Sums, measured
from support.slow import DIFFERENT, slow_families, slow_unless
from support.tiny import windows_of

# A norm stands between these families' experts and the stream, so EASY-EP's "before" is not defined for them.
NORM_AFTER_EXPERTS = ("flex_olmo", "afmoe", "deepseek_v4", "hy_v4", "inkling_text")
MEANS = ("mean_output", "mean_gated_output")
CANCELLING = (*MEANS, "logit_gram")


FUNCTIONS = {name: each.function for name, each in registered().items() if each.needs in ("text", "weights")}
FUNCTIONS["gate_mass_full"] = scores.gate_mass_full


def assert_scores(sums: Sums, expected: dict[int, naive.LayerReference], names: set[str], rtol: float = 1e-5) -> None:
    assert sums.keys() == expected.keys()
    for layer, reference in expected.items():
        for name, value in reference.scores().items():
            if name in names:
                got = FUNCTIONS[name](sums[layer])
                torch.testing.assert_close(
                    got, value, rtol=rtol, atol=1e-12, equal_nan=True, msg=lambda m, at=(layer, name): f"{at}: {m}"
                )


def assert_same_sums(a: Sums, b: Sums, without: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys()
    for layer, table in a.items():
        assert torch.equal(table["count"], b[layer]["count"])
        assert torch.equal(table["both"], b[layer]["both"])
        assert table.keys() == b[layer].keys()
        for name in table.keys() - set(without):
            value = b[layer][name]
            # Inner products and means cancel: their digits are those of the largest.
            digits = 1e-6 * float(value.abs().max()) if name in CANCELLING else 1e-9
            torch.testing.assert_close(
                table[name], value, rtol=1e-5, atol=digits, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE))
def test_every_score_equals_the_naive_reference(family, family_checkpoint):
    expected = naive.reference(tiny.make(family), family, IDS, PADDED)
    names = set(FUNCTIONS) - ({"easy_ep"} if family in NORM_AFTER_EXPERTS else set())
    assert_scores(measured(family_checkpoint(family), windows_of(IDS, PADDED)), expected, names)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("granitemoe", {"residual_multiplier": 0.22}), ("minimax", {"mlp_beta_factor": 0.5})],
)
def test_easy_ep_subtracts_what_the_block_really_adds(family, overrides, tmp_path):
    checkpoint = open_checkpoint(tiny.save(tiny.make(family, **overrides), tmp_path))
    expected = naive.reference(tiny.make(family, **overrides), family, IDS)
    assert_scores(measured(checkpoint, windows_of(IDS)), expected, {"easy_ep"})


def test_easy_ep_keeps_its_digits_where_experts_hardly_turn_the_token(tmp_path):
    model = tiny.make("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data *= 3e-3
    checkpoint = open_checkpoint(tiny.save(model, tmp_path))
    sums = measured(checkpoint, windows_of(IDS))
    assert_scores(sums, naive.reference(model, "mixtral", IDS), {"easy_ep"}, rtol=2e-3)


def test_easy_ep_is_refused_in_a_latent_space(tmp_path):
    checkpoint = open_checkpoint(tiny.save(tiny.make("nemotron_h", moe_latent_size=16), tmp_path))
    for sums in measured(checkpoint, windows_of(IDS)).values():
        assert scores.ean(sums).sum() > 0
        with pytest.raises(ValueError, match="latent"):
            scores.easy_ep(sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_scores_keep_their_digits_on_wide_experts(dtype):
    generator = torch.Generator().manual_seed(0)
    experts, router = nn.Module(), nn.Linear(8, 2, bias=False)
    experts.gate_up_proj = nn.Parameter(torch.randn(2, 2048, 1024, generator=generator).to(dtype))
    experts.down_proj = nn.Parameter(torch.randn(2, 1024, 1024, generator=generator).to(dtype))
    sums = {f"weight_{k}": v for k, v in weight_sums(MoEView(nn.Module(), experts, router, {})).items()}
    flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1).double()
    expected = -flat.abs().mean(1) / flat.square().mean(1).sqrt()
    torch.testing.assert_close(scores.aimer(sums), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.weight_norm(sums), flat.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *slow_unless(lambda family, _: family in DIFFERENT, tiny.CONFIGS, [torch.bfloat16]),
        *(("gpt_oss", torch.float16), ("afmoe", torch.float16)),
    ],
)
def test_half_precision_layers_are_the_stock_models(family, dtype, family_folder, family_checkpoint):
    """Selection biases stay in fp32: rounded to bf16, they would choose other experts."""
    model = AutoModelForCausalLM.from_pretrained(family_folder(family), dtype=dtype)
    hf.complete_experts(model)
    expected = model.state_dict()
    layers = StreamedLayers(family_checkpoint(family), CPU, dtype)
    for index in range(family_checkpoint(family).num_layers):
        with layers.layer(index):
            for name, tensor in hf.layer_state(layers.model, index).items():
                assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_every_sigmoid_router_of_transformers_is_known():
    """Read from the modelling files, so that the next release of transformers names the families it adds."""
    router = re.compile(r"^class \w+(?:Top[kK]|TokenChoice)Router\(.*?(?=^\S|\Z)", re.M | re.S)
    found: set[str] = set()
    for file in Path(transformers.models.__file__).parent.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "@use_experts" in text and any("sigmoid" in r and "softmax(" not in r for r in router.findall(text)):
            config = file.with_name(file.name.replace("modeling_", "configuration_")).read_text(encoding="utf-8")
            found |= set(re.findall(r"model_type = \"(\w+)\"", config))
    known = {name for name, family in FAMILIES.items() if family.router_scores == "sigmoid"}
    assert {"deepseek_v3", "glm4_moe", "nemotron_h"} <= found
    # A multimodal wrapper, and a router that ranks its shared experts, too.
    unusual = {"dots3_note", "inkling_text"}
    assert found & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known | unusual


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE))
def test_sums_do_not_depend_on_the_batch_size(family, family_checkpoint, monkeypatch):
    checkpoint = family_checkpoint(family)
    whole = measured(checkpoint, windows_of(IDS))
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12 * 3)
    assert_same_sums(measured(checkpoint, windows_of(IDS)), whole)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text"])
def test_sums_do_not_depend_on_order_or_padding(family, family_checkpoint, monkeypatch):
    checkpoint = family_checkpoint(family)
    whole = measured(checkpoint, windows_of(IDS, PADDED))
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12 * 2)
    order = torch.tensor([2, 0, 3, 1])
    assert_same_sums(measured(checkpoint, windows_of(IDS[order], PADDED[order])), whole)
    alone = [measured(checkpoint, windows_of(row[m][None])) for row, m in zip(IDS, PADDED, strict=True)]
    joined = {i: {k: joined_sums(k, [a[i] for a in alone]) for k in alone[0][i]} for i in alone[0]}
    assert_same_sums(joined, whole)


def joined_sums(name: str, parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One sum of a text from those of its windows."""
    stacked = torch.stack([part[name].double() for part in parts])
    if name in MEANS:
        count = torch.stack([part["count"] for part in parts])[..., None]
        return ((stacked * count).sum(0) / count.sum(0).clamp_min(1)).float()
    if "weight" in name:
        return stacked[0]
    return stacked.amax(0) if name == "max" else stacked.sum(0)


def test_a_fold_left_out_is_its_windows_left_out(family_checkpoint):
    checkpoint = family_checkpoint("mixtral")
    without = measured(checkpoint, windows_of(IDS), left_out=1)
    # Mean outputs are not kept per component: a fold that is left out stays in them.
    assert_same_sums(without, measured(checkpoint, windows_of(IDS[[0, 2, 3]])), without=MEANS)


def test_experts_that_do_not_report_are_noticed(family_checkpoint, monkeypatch):
    monkeypatch.setattr(fold_module.hf, "use_experts_function", lambda model: None)
    with pytest.raises(AssertionError, match="layer 0: tokens were routed, but no expert reported one"):
        measured(family_checkpoint("mixtral"), windows_of(IDS))
