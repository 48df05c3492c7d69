"""A teacher in few bits, or packed by itself, teaches what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_compress
from moe_compress.compression.recovery import teachers
from moe_compress.compression.recovery.rounded_teacher import rounded_model, rounding_kl
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.methods import registry
from moe_compress.models import hf
from moe_compress.models.modeling.packed_linear import PackedMatrix
from support import tiny
from support.interrupted import counting
from support.pruned import run_of
from support.slow import slow_families

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")
RECIPE = "expert_drop ratio=0.5 + distill steps=2 batch=2"
WINDOWS = tiny.windows_of(tiny.token_ids(rows=4, length=16))


def streamed(checkpoint, dtype=torch.float32):
    return StreamedLayers(checkpoint, tiny.CPU, dtype)


@pytest.mark.parametrize("family", slow_families(("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen2_moe"), 2))
def test_all_matrices_of_layers_are_rounded(family, family_checkpoint):
    checkpoint = family_checkpoint(family)
    stock = hf.auto_class(checkpoint.config).from_pretrained(checkpoint.folder, dtype=torch.float32)
    plain = {name: each.weight.detach() for name, each in stock.named_modules() if isinstance(each, nn.Linear)}
    kl = {}
    for bits, step, most in ((8, 0.007, 0.1), (4, 0.11, 1.0)):
        model = rounded_model(checkpoint, streamed(checkpoint), bits)
        packed = [each for each in model.modules() if isinstance(each, PackedMatrix)]
        left = [name for name, each in hf.stack(model).layers.named_modules() if isinstance(each, nn.Linear)]
        assert {each.bits for each in packed} == {bits} and all("gate" in name or "router" in name for name in left)
        assert sum(each.numel() for each in model.parameters()) < 0.8 * checkpoint.bytes / 4
        for name, each in model.named_modules():
            if isinstance(each, PackedMatrix) and name in plain:
                assert 0 < float((each.dense() - plain[name]).norm() / plain[name].norm()) < step
        kl[bits] = rounding_kl(streamed(checkpoint), ResidentLayers(model), WINDOWS)
        whole, rounded = (forward_layers(each, WINDOWS)[1] for each in (streamed(checkpoint), ResidentLayers(model)))
        # Of random models, whose tokens easily go to other experts.
        off_NS = (rounded - whole).flatten(2).norm(dim=2) / whole.flatten(2).norm(dim=2)
        assert 0 < float(off_NS.median()) < most
    assert 0 < kl[8] < kl[4] / 3


def report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "moe_compress.json").read_text())["report"][-1]["training"]


def test_it_says_how_far_it_is_from_what_it_was(lab, tmp_path, monkeypatch):
    options = {**lab("mixtral"), "results": str(tmp_path)}
    loaded = counting(monkeypatch, teachers, "rounded_model")
    said = [
        report(moe_compress.compress(f"{RECIPE} {words}", **options).folder)
        for words in (
            "teacher_bits=8", "teacher_bits=4", "teacher_bits=4 cache=topk", "teacher_bits=4 cache=topk lr=1e-4",
            "teacher_bits=4 loss=logits,router,hidden", "cache=topk",
        )
    ]  # fmt: skip
    kl = [each.get("teacher_kl") for each in said]
    assert 0 < kl[0] < kl[1] == kl[2] == kl[3] == kl[4] and kl[5] is None
    # The fourth has it from the cache.
    assert len(loaded) == 4
    assert said[2]["kept"] == said[3]["kept"] != said[5]["kept"]


@pytest.mark.parametrize("words", ["loss=logits,router,hidden", "cache=topk"])
def test_a_teacher_that_is_packed(words, wide_lab, wide_made, tmp_path):
    folder = wide_made("mixtral", "quantize method=rtn bits=8 group_size=32 format=packed")
    options = {**wide_lab("mixtral"), "results": str(tmp_path)}
    found, plain = (
        report(moe_compress.compress(f"{RECIPE} {words} {teacher}", **options).folder)["curve"]
        for teacher in (f"teacher={folder}", "")
    )
    for term, losses in plain.items():
        assert found[term] == pytest.approx(losses, rel=0.1) and found[term] != losses


def test_rounding_what_is_packed_is_refused(wide_lab, wide_made, tmp_path):
    options = {**wide_lab("mixtral"), "results": str(tmp_path)}
    for words in ("format=packed", "format=compressed-tensors"):
        folder = wide_made("mixtral", f"quantize method=rtn bits=8 group_size=32 {words}")
        with pytest.raises(ValueError, match=r"teacher_bits=4: .* is packed already; leave teacher_bits= out"):
            moe_compress.compress(f"{RECIPE} teacher={folder} teacher_bits=4", **options)


@pytest.mark.parametrize(
    ("words", "share"),
    [({}, 1.0), ({"teacher_bits": "4"}, 1 / 8), ({"cache": "topk"}, 0.0), ({"loss": "labels"}, 0.0)],
)
def test_memory_is_asked_for_as_the_teacher_takes_it(words, share, family_checkpoint, lab):
    checkpoint = family_checkpoint("mixtral")
    found = teachers.online_bytes(registry.find("distill").run(**words), checkpoint, run_of(lab("mixtral")))
    assert found == pytest.approx(share * checkpoint.bytes, abs=8)


def test_nothing_is_rounded_of_a_teacher_that_is_not_asked(lab, tmp_path):
    with pytest.raises(ValueError, match=r"loss=labels with teacher_bits=4: nothing is asked of the original"):
        moe_compress.compress(f"{RECIPE} loss=labels teacher_bits=4", **{**lab("mixtral"), "results": str(tmp_path)})
