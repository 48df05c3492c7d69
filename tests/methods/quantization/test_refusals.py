"""What cannot be quantized, and how small the files get."""

from __future__ import annotations

import json

import pytest

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward
from support.interrupted import counting
from support.pruned import refused
from support.quantized import BLIND, FEW

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("mixtral", "quantize bits=5", "quantize.bits=5: allowed: 2, 3, 4, 8, auto."),
        ("mixtral", "quantize bits=auto", "bits=auto needs budget=, the mean bits a weight, from 2 to 8."),
        ("mixtral", "quantize budget=3", "quantize.budget=3.0 would do nothing: it goes with bits=auto."),
        ("mixtral", "quantize group_size=-1", "group_size=-1: the inputs that share a scale are 0 (a whole row) or 8"),
        ("mixtral", "quantize group_size=4", "group_size=4: the inputs that share a scale are 0 (a whole row) or 8"),
        (
            "mixtral",
            "quantize format=fp8",
            "format=fp8 packs matrices whose number of inputs is a multiple of 128, and",
        ),
        ("mixtral", "quantize damping=0", "damping=0.0: a share of the mean of the diagonal, above 0, is needed."),
        ("mixtral", "quantize damping=nan", "damping=nan: a share of the mean of the diagonal"),
        ("mixtral", "quantize method=rtn act_order=true", "quantize.act_order=true would do nothing: it goes with"),
        ("mixtral", "quantize method=foo", "quantize.method=foo: allowed: rtn, gptq, awq."),
        ("mixtral", "quantize format=foo", "quantize.format=foo: allowed: auto, awq, compressed-tensors"),
        ("mixtral", "quantize unseen=magnitude", "quantize.unseen=magnitude: allowed: rtn, pooled, error."),
        ("mixtral", "quantize experts_at_once=-1", "experts_at_once=-1 min_tokens=32: counts from 0 (all) and from 1"),
        ("gpt_oss", "quantize format=compressed-tensors", "gpt_oss stores mlp.experts.gate of layer 0 together with"),
        ("jetmoe", "quantize method=rtn", "experts of jetmoe cannot be changed"),
        ("jetmoe", "quantize", "experts of jetmoe cannot be changed"),
        ("mixtral", "expert_drop keep=4 + quantize group_size=4", "stage 2 (quantize): group_size=4: the inputs"),
    ],
)
def test_what_cannot_be_quantized(family, sentence, said, wide_lab, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    assert said in refused(sentence, wide_lab(family), tmp_path)
    assert not calls


def test_widths_that_no_group_divides(reader_folder, tmp_path):
    config = json.loads((reader_folder("mixtral") / "config.json").read_text())
    values = {**config, "hidden_size": 36, "head_dim": 8, "intermediate_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="divides the inputs of these matrices, so none would be rounded"):
        moe_compress.plan("quantize group_size=8", model=str(tmp_path))
    found = moe_compress.plan("quantize group_size=0", model=str(tmp_path))
    assert found.after.bytes < found.before.bytes


def test_no_plan_holds_quantized_weights(wide_lab, wide_made, tmp_path):
    options = {**wide_lab("mixtral"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="its stage quantize changes weights, which no plan holds: run the recipe"):
        moe_compress.apply(wide_made("mixtral", BLIND) / "plan.json", **options)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("mixtral", BLIND),
        ("mixtral", f"{FEW} bits=3 format=dense"),
        ("mixtral", f"{BLIND} + expert_drop score=weight_norm keep=4 budget=global"),
        ("deepseek_v3", f"{BLIND} where=all"),
        ("gpt_oss", f"{FEW} bits=3"),
        ("mixtral", "quantize method=rtn clip=max group_size=0"),
    ],
)
def test_a_forecast_says_how_small_the_files_get(family, sentence, wide_lab, wide_made):
    found, written = moe_compress.plan(sentence, **wide_lab(family)), open_checkpoint(wide_made(family, sentence))
    assert found.after.bytes == pytest.approx(written.bytes, rel=0.02)
    assert found.after.bytes < 0.6 * found.before.bytes or "dense" in sentence
    again = moe_compress.plan("top_k k=1", **{**wide_lab(family), "model": str(written.folder)})
    assert again.before.bytes == pytest.approx(written.bytes, rel=0.02)
