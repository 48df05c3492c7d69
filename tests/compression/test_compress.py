"""Compressing from end to end, on tiny models that can read: what is written, and what is not done twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.reader import open_checkpoint
from support import readers
from support.checkpoints import counts, kept, same_checkpoint, weights
from support.identity import rewritten
from support.slow import slow_after

Folder = Callable[[str], Path]
Options = dict[str, object]
FAMILIES = ("mixtral", "deepseek_v3")


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_compress")


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_compress_writes_a_checkpoint_a_record_and_a_row(family, reader_folder, options, tmp_path):
    result = moe_compress.compress("expert_drop score=reap keep=6", model=reader_folder(family), **options)
    assert result.folder.parent == tmp_path / "results" / "checkpoints"
    assert set(counts(result.folder).values()) == {6}
    model, info = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    ids = tokenizer("the lazy dog", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[-1] == readers.VOCAB
    assert (result.folder / "LICENSE").is_file()

    record = result.record
    assert record.recipe[0]["given"] == {"score": "reap", "keep": 6}
    assert record.metrics["perplexity"].value > 0 and record.metrics["kl"].value > 0
    assert record.sizes["parameters"] < result.original.sizes["parameters"]
    assert record.sizes["touched"] < result.original.sizes["touched"]  # the router's rows are fewer
    assert {p.stem for p in (tmp_path / "results" / "records").iterdir()} == {record.name, result.original.name}

    (table,) = moe_compress.table([tmp_path / "results" / "records"])
    assert list(table.frame["recipe"]) == ["original", "expert_drop score=reap keep=6"]
    events = [json.loads(line) for f in (tmp_path / "results" / "logs").iterdir() for line in f.open()]
    assert [event["event"] for event in events] == ["started", "calibrated", "written", "evaluated"]


def test_a_second_recipe_runs_no_forward(reader_folder, options, forwards, caplog):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    first = moe_compress.compress("expert_drop score=reap keep=6", **options)
    assert len(forwards) > 0
    forwards.clear()
    caplog.clear()
    second = moe_compress.compress("expert_drop score=easy_ep ratio=0.5 budget=global", **options)
    assert not forwards
    assert "no forward needed" in caplog.text
    assert counts(first.folder) != counts(second.folder)


def test_the_same_recipe_again_does_nothing(reader_folder, options, forwards, caplog):
    options = {**options, "eval": False, "model": reader_folder("mixtral")}
    first = moe_compress.compress("expert_drop keep=6", **options)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    forwards.clear()
    assert moe_compress.compress("expert_drop keep=6", **options).folder == first.folder
    assert not forwards and "is already there" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_changed_text_under_the_same_name_is_another_recipe(reader_folder, options, texts, tmp_path):
    text = tmp_path / "text.txt"
    options = {**options, "eval": False, "model": reader_folder("mixtral"), "data": text, "out": tmp_path / "out"}
    text.write_text("\n\n".join(readers.LINES * 4))
    moe_compress.compress("expert_drop keep=6", **options)
    text.write_text("\n\n".join(line.upper() for line in readers.LINES * 4))
    with pytest.raises(ValueError, match="already holds something"):
        moe_compress.compress("expert_drop keep=6", **options)


def test_methods_without_text_run_no_forward(reader_folder, options, forwards):
    for sentence in ("expert_drop score=random", "expert_drop score=aimer", "prune method=magnitude"):
        moe_compress.compress(sentence, model=reader_folder("deepseek_v3"), **{**options, "eval": False})
    assert not forwards


def test_reading_and_writing_every_layer_changes_no_tensor(reader_folder, options, tmp_path):
    source = open_checkpoint(reader_folder("deepseek_v3"))
    written = rewritten(source, tmp_path / "same")
    (written.folder / MANIFEST).unlink()
    result = moe_compress.evaluate(written.folder, original=source.folder, **options)
    with source.read(source.tensors) as before, written.read(written.tensors) as after:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name][...], after[name][...]) for name in before)
    assert result.record.metrics["delta_nll"].value == 0 and result.record.metrics["top1_agreement"].value == 1


def test_random_depends_on_the_seed_and_seeds_share_a_row(reader_folder, options, tmp_path):
    for seed in (0, 1):
        moe_compress.compress("expert_drop score=random keep=4", model=reader_folder("mixtral"), seed=seed, **options)
    first, second = sorted((tmp_path / "results" / "checkpoints").iterdir())
    assert kept(first) != kept(second)
    (table,) = moe_compress.table([tmp_path / "results" / "records"])
    assert list(table.frame["recipe"]) == ["original", "expert_drop score=random keep=4 (2 seeds)"]


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_stages_compose_and_their_plan_is_one(family, reader_folder, options, tmp_path):
    options = {**options, "eval": False, "model": reader_folder(family)}
    both = moe_compress.compress("expert_drop keep=6 + expert_drop keep=4 score=frequency", **options).folder
    assert sorted(p.name for p in both.parent.iterdir()) == [both.name]
    one = moe_compress.compress("expert_drop keep=6", out=tmp_path / "one", **options).folder
    two = moe_compress.compress(
        "expert_drop keep=4 score=frequency", out=tmp_path / "two", **{**options, "model": one}
    ).folder
    assert weights(both) == weights(two)
    first, second = kept(one), kept(two)
    assert kept(both) == {layer: [first[layer][e] for e in experts] for layer, experts in second.items()}
    again = moe_compress.apply(both / "plan.json", **{**options, "out": tmp_path / "again", "model": ""})
    assert same_checkpoint(again.folder, both)


def test_stages_pass_through_an_edited_checkpoint(reader_folder, options):
    sentence = "expert_drop score=random budget=global ratio=0.25 seed=1 + expert_drop ratio=0.25"
    result = moe_compress.compress(sentence, model=reader_folder("mixtral"), **options)
    found = counts(result.folder)
    assert result.record.form == "edited" and len(set(found.values())) > 1
    model = moe_compress.load(result.folder)
    assert [view.experts.down_proj.shape[0] for view in model.model.layers[0].modules() if hasattr(view, "experts")]
    assert len(result.record.recipe) == len(result.record.report) == 2


def test_a_checkpoint_where_a_stage_would_go_is_never_removed(reader_folder, options, tmp_path):
    options = {**options, "eval": False, "model": reader_folder("mixtral"), "out": tmp_path / "out"}
    mine = moe_compress.compress("expert_drop keep=6", **{**options, "out": tmp_path / "out.stage1"}).folder
    with pytest.raises(ValueError, match=r"out\.stage1 already holds something"):
        moe_compress.compress("expert_drop keep=7 + expert_drop keep=4", **options)
    result = moe_compress.compress("expert_drop keep=6 + expert_drop keep=4", **options)
    assert set(counts(result.folder).values()) == {4} and set(counts(mine).values()) == {6}


@pytest.mark.parametrize("later", [{}, {"eval_samples": 2}, {"resident": True}])
def test_a_checkpoint_that_was_not_evaluated_is_not_made_again(later, reader_folder, options):
    """How it is evaluated says nothing of the weights."""
    sentence, model = "expert_drop score=weight_norm keep=6 + expert_drop keep=4", reader_folder("mixtral")
    made = moe_compress.compress(sentence, model=model, **{**options, "eval": False})
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    again = moe_compress.compress(sentence, model=model, **{**options, **later})
    assert again.folder == made.folder and again.record is not None
    assert {path: path.stat().st_mtime_ns for path in made.folder.glob("*.safetensors")}.items() <= before.items()
    assert [path.name for path in made.folder.parent.iterdir()] == [made.folder.name]
    other = moe_compress.compress(sentence, model=model, **{**options, "samples": 7, "eval": False})
    assert other.folder != made.folder
