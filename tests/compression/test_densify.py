"""densify end to end: exact where the router is constant, stock where it is not, and what comes behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.ancestry import Ancestry
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES
from moe_compress.models.shape import model_shape
from support import readers, tiny
from support.dense import FAMILIES_MADE_DENSE, with_equal_gates
from support.interrupted import Interrupted, counting, outcome
from support.slow import slow_after, slow_families
from support.trimming import plan_edits

IDS = tiny.token_ids()
SHARED_GATE = ("qwen2_moe", "qwen3_next")


@torch.no_grad()
def logits(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(IDS, use_cache=False).logits, model


@pytest.mark.parametrize("family", slow_families(FAMILIES_MADE_DENSE, 7))
@pytest.mark.parametrize("scale", ["mean", "uniform"])
def test_all_experts_with_fixed_gates_are_the_moe(family, scale, texts, tmp_path):
    source = with_equal_gates(family, tmp_path / "moe")
    files = {"data": str(texts / "calibration.txt"), "eval": False, "results": str(tmp_path)}
    options = {**readers.OPTIONS, **files, "model": str(source), "out": str(tmp_path / "dense")}
    folder = moe_compress.compress(f"densify keep=all scale={scale}", **options).folder
    before, _ = logits(source)
    after, model = logits(folder)
    assert (after - before).abs().max() < 1e-5
    assert model.config.model_type in FAMILIES[family].dense_as
    plan = json.loads((folder / "plan.json").read_text())["stages"][0]
    shared = {edit["shared"] for edit in plan["edits"] if edit["experts"]}
    assert shared == {0.5 if family in SHARED_GATE else 1.0}


@pytest.mark.parametrize("family", slow_families(FAMILIES_MADE_DENSE, 7))
def test_what_is_written_is_what_was_planned(family, lab, made):
    options, folder = lab(family), made(family, "densify keep=3")
    source, checkpoint = open_checkpoint(Path(options["model"])), open_checkpoint(folder)
    shape = model_shape(hf.skeleton(source.config, torch.float32))
    width = max(3 * tiny.INNER + moe.shared for moe in shape.moe)
    assert checkpoint.text_config.intermediate_size == width >= max(shape.dense.values(), default=0)
    stored = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    for layer in range(tiny.LAYERS):
        assert list(stored[f"model.layers.{layer}.mlp.up_proj.weight"]) == [width, tiny.HIDDEN]
        assert list(stored[f"model.layers.{layer}.mlp.down_proj.weight"]) == [tiny.HIDDEN, width]
    assert not any("expert" in name or "router" in name for name in stored)
    assert "mixture-of-experts" not in (folder / "README.md").read_text()
    planned = moe_compress.plan("densify keep=3", **options)
    assert (planned.form, planned.after.bytes) == ("plain", checkpoint.bytes)
    _, model = logits(folder)
    assert planned.after.parameters == sum(each.numel() for each in model.parameters())
    assert planned.after.touched < planned.before.parameters


def test_narrower_mlps_are_filled_up_with_zeros(lab, made):
    source, checkpoint = (
        open_checkpoint(Path(lab("deepseek_v3")["model"])),
        open_checkpoint(made("deepseek_v3", "densify")),
    )
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    with source.read(names) as before, checkpoint.read(names) as after:
        for name in names:
            old, new = before[name][:], after[name][:]
            dim = name.endswith("down_proj.weight")
            part = new.narrow(int(dim), 0, old.shape[int(dim)])
            assert torch.equal(part, old) and new.abs().sum() == old.abs().sum()
            assert new.shape[int(dim)] == 2 * tiny.INNER + tiny.INNER > old.shape[int(dim)]


def test_its_experts_are_nobody_s_any_more(lab, made):
    edits = plan_edits(made("mixtral", "densify keep=3"))
    kin = Ancestry.of(edits, tiny.LAYERS, dict.fromkeys(range(tiny.LAYERS), tiny.EXPERTS))
    assert kin.source == list(range(tiny.LAYERS))
    assert all(place == [-1] * tiny.EXPERTS for place in kin.place.values())


@pytest.mark.parametrize("train", ["dense", "all"])
def test_it_learns_from_the_moe(train, lab, made, tmp_path):
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    steps = f"train={train} loss=logits,hidden steps=2 batch=2"
    folder = moe_compress.compress(f"densify keep=3 + distill {steps}", **options).folder
    checkpoint, before = open_checkpoint(folder), open_checkpoint(made("mixtral", "densify keep=3"))
    assert checkpoint.config.model_type == "mistral" and checkpoint.bytes == before.bytes
    manifest = json.loads((folder / "moe_compress.json").read_text())
    assert [stage["method"] for stage in manifest["stages"]] == ["densify", "distill"]
    assert len(manifest["report"][1]["training"]["curve_steps"]) == 2
    own = {**options, "model": str(before.folder), "out": str(tmp_path / "own")}
    again = moe_compress.compress(f"distill {steps} teacher={lab('mixtral')['model']}", **own).folder
    name = "model.layers.1.mlp.up_proj.weight"
    with open_checkpoint(again).read([name]) as one, checkpoint.read([name]) as other, before.read([name]) as untrained:
        assert torch.equal(one[name][:], other[name][:])
        assert not torch.equal(one[name][:], untrained[name][:])


def test_a_killed_run_goes_on(lab, monkeypatch, tmp_path):
    options, sentence = lab("deepseek_v3"), "densify keep=3"
    whole = moe_compress.compress(sentence, **{**options, "out": str(tmp_path / "whole")}).folder
    again = {**options, "out": str(tmp_path / "again")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer, "write_shard", stop_at=2)
        moe_compress.compress(sentence, **again)
    assert not (tmp_path / "again").exists()
    with monkeypatch.context() as patch:
        written = counting(patch, writer, "write_shard")
        folder = moe_compress.compress(sentence, **again).folder
    assert len(written) == tiny.LAYERS + 1 - 2 and outcome(folder) == outcome(whole)


def test_a_plan_of_several_stages_is_applied_at_once(lab, made, tmp_path):
    sentence = "block_drop layers=1 + expert_drop keep=4 + densify keep=3"
    folder = made("mixtral", sentence)
    options = {key: lab("mixtral")[key] for key in ("data", "eval_data", "eval", "results")}
    applied = moe_compress.apply(str(folder / "plan.json"), **options, out=str(tmp_path / "out")).folder
    shards = [{p.name: p.read_bytes() for p in sorted(each.glob("*.safetensors"))} for each in (folder, applied)]
    assert shards[0] == shards[1] and shards[0]
    assert open_checkpoint(applied).num_layers == tiny.LAYERS - 1


@pytest.mark.parametrize("command", slow_after(2, ["flops", "evaluate", "verify"]))
def test_harnesses_take_it_as_any_model(command, lab, made):
    folder, options = made("mixtral", "densify keep=3"), lab("mixtral")
    if command == "verify":
        assert moe_compress.verify(folder, results=options["results"]).passed
    elif command == "flops":
        rows = {each.name: each for each in moe_compress.flops(folder, results=options["results"]).components}
        assert not rows["routed experts"].parameters and rows["dense MLPs"].parameters
    else:
        words = {key: options[key] for key in ("eval_data", "results", "eval_samples", "eval_length")}
        metrics = moe_compress.evaluate(folder, **words).record.metrics
        assert "kl" in metrics and not any(name.startswith("routing") for name in metrics)


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("expert_drop keep=4", "this model has no experts: its layers were made dense of those of a mixtral model"),
        ("densify", "this model has no experts"),
        ("channels", "this model has no experts"),
        ("distill teacher={moe}", "mistral as it is here has none of these"),
        ("router_kd teacher={moe}", "mistral as it is here has none of these"),
        ("prune", "where=experts: mistral has no such part"),
        ("quantize where=dense group_size=8", "codes of a mistral model without experts are not stored here"),
    ],
)
def test_what_needs_experts_is_refused(sentence, said, lab, made, tmp_path):
    options = {**lab("mixtral"), "model": str(made("mixtral", "densify keep=3")), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=said):
        moe_compress.compress(sentence.format(moe=lab("mixtral")["model"]), **options)
    assert not (tmp_path / "out").exists()


def test_other_dense_models_are_refused_as_before(tmp_path, made):
    folder = made("mixtral", "densify keep=3")
    values = json.loads((folder / "config.json").read_text())
    del values["made_dense_from"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not a Mixture-of-Experts architecture"):
        open_checkpoint(tmp_path)
