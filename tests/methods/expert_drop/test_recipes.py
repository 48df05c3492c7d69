"""expert_drop from end to end: reverse, protected experts, global budgets, experts without tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_compress
from support import readers
from support.checkpoints import counts, kept, scores
from support.slow import slow_after

FAMILIES = ("mixtral", "deepseek_v3")


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_reverse_drops_what_would_stay(family, reader_folder, options):
    options = {**options, "eval": False, "model": reader_folder(family)}
    best = kept(moe_compress.compress("expert_drop keep=4 score=frequency", **options).folder)
    worst = kept(moe_compress.compress("expert_drop keep=4 score=frequency reverse=true", **options).folder)
    used = scores(moe_compress.compress("expert_drop keep=4 score=frequency", **options).folder)
    for layer, experts in best.items():
        total = {side: sum(used[str(layer)][e] for e in ids) for side, ids in [("b", experts), ("w", worst[layer])]}
        assert total["b"] > total["w"]


def test_protected_experts_stay(reader_folder, options):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    plain = kept(moe_compress.compress("expert_drop keep=4", **options).folder)
    dropped = next(e for e in range(8) if e not in plain[1])
    guarded = moe_compress.compress(f"expert_drop keep=4 protect=1:{dropped}", **options).folder
    assert dropped in kept(guarded)[1]
    assert {layer: ids for layer, ids in kept(guarded).items() if layer != 1} == {
        layer: ids for layer, ids in plain.items() if layer != 1
    }
    manifest = json.loads((guarded / "moe_compress.json").read_text())
    assert manifest["report"][0]["protected"] == {"1": [dropped]}


def test_super_experts_stay(options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model", num_hidden_layers=4)
    checkpoint = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        checkpoint.model.layers[1].mlp.experts.down_proj[5] *= 100
    checkpoint.save_pretrained(folder)
    words = "expert_drop score=frequency reverse=true keep=2 protect=super"
    made = moe_compress.compress(words, model=folder, **{**options, "eval": False}).folder
    assert 5 in kept(made)[1]
    assert json.loads((made / "moe_compress.json").read_text())["report"][0]["protected"] == {"1": [5]}


@pytest.mark.parametrize(("family", "floor"), slow_after(1, [("mixtral", 2), ("deepseek_v3", 4)]))
def test_a_global_budget_keeps_every_layer_s_floor(family, floor, reader_folder, options, monkeypatch):
    options = {**options, "eval": False, "model": reader_folder(family)}
    made = moe_compress.compress("expert_drop score=weight_norm budget=global ratio=0.5", **options).folder
    found = counts(made)
    assert sum(found.values()) == 4 * len(found) and min(found.values()) >= floor
    lowest = moe_compress.compress(f"expert_drop score=ean budget=global keep={floor}", **options).folder
    assert set(counts(lowest).values()) == {floor}


def test_experts_without_tokens(options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[3] = 0
        model.model.layers[2].mlp.gate.weight[4] = 0
        model.model.layers[2].post_attention_layernorm.weight.mul_(50)  # routing is all or nothing
    model.save_pretrained(folder)
    options = {**options, "eval": False, "model": folder, "samples": 1}
    dropped = moe_compress.compress("expert_drop keep=6", **options).folder
    missed = json.loads((dropped / "moe_compress.json").read_text())["report"][0]["experts_without_tokens"]["2"]
    assert missed
    assert len(set(missed) & set(kept(dropped)[2])) == max(0, len(missed) - 2)
    spared = moe_compress.compress("expert_drop keep=6 unseen=keep", **options).folder
    assert len(set(missed) & set(kept(spared)[2])) == min(len(missed), 6)
    with pytest.raises(ValueError, match="no calibration token reached experts"):
        moe_compress.compress("expert_drop keep=6 unseen=error", **options)
