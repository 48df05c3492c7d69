"""shrink is the recipe of its stages: for the plan, the checkpoint, resuming and lineage alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.catalogue import method_markdown
from moe_compress.recipes.parser import parse
from support import readers, tiny
from support.interrupted import Interrupted, counting, outcome

WORDS = "experts=0.5 width=0.5 stages=2 steps=2"
ONE = "expert_drop ratio=0.2929 + channels ratio=0.2929 + distill steps=2 train=all"
OPTIONS = {"samples": 8, "length": 16, "eval": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A reader whose experts are wide enough to be cut twice in steps of 8."""
    return readers.save_model("mixtral", tmp_path_factory.mktemp("wide") / "mixtral", intermediate_size=64)


def run_options(source: Path, texts: Path, place: Path) -> dict[str, object]:
    files = {"data": str(texts / "calibration.txt"), "results": str(place), "out": str(place / "out")}
    return {**OPTIONS, **files, "model": str(source)}


def test_it_is_the_recipe_of_its_stages(tmp_path):
    found, written = parse(f"shrink {WORDS}"), parse(f"{ONE} + {ONE}")
    assert found == written and found.to_yaml() == written.to_yaml()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"stages": [{"shrink": {"experts": 0.5, "steps": 2}}, "top_k"], "samples": 3}))
    again = parse(str(file), ["1.stages=1"])
    assert [stage.method for stage in again.stages] == ["expert_drop", "channels", "distill", "top_k"]
    assert again.stages[0].parameters["ratio"] == again.stages[1].parameters["ratio"] == 0.5
    assert again.options.samples == 3


def test_words_of_one_of_its_stages_are_said_to_need_the_recipe_written_out():
    with pytest.raises(
        ValueError, match=r"no stage 'distill'; stages: shrink, top_k\. For words of one stage of shrink"
    ):
        parse("shrink + top_k k=1", ["distill.batch=1"])


def test_what_stays_whole_is_no_stage():
    assert [each.method for each in parse("shrink experts=1 stages=1").stages] == ["channels", "distill"]
    assert [each.method for each in parse("shrink width=1 stages=2").stages] == 2 * ["expert_drop", "distill"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stages=0", "shrink.stages=0: a whole number from 1 up is needed"),
        ("steps=0", "shrink.steps=0: a whole number from 1 up is needed"),
        ("experts=0", "shrink.experts=0.0: the share that is left is above 0 and at most 1"),
        ("width=1.5", "shrink.width=1.5: the share that is left"),
        ("experts=1 width=1", "would leave the model as it is"),
        ("keep=4", "unknown key 'keep'"),
        ("train=everything", "train=everything: a comma-separated list"),
    ],
)
def test_words_that_mean_nothing(words, said):
    with pytest.raises(ValueError, match=said):
        moe_compress.plan(f"shrink {words}", model="tiny-mixtral")


def test_list_shows_it():
    shown = method_markdown("shrink")
    assert "### shrink (presets of stages)" in shown and "- `stages=2`: whole number from 1" in shown


def test_two_stages_are_one_lineage_and_a_killed_run_goes_on(source, texts, tmp_path, monkeypatch):
    whole = moe_compress.compress(f"shrink {WORDS}", **run_options(source, texts, tmp_path / "whole")).folder
    checkpoint = open_checkpoint(whole)
    assert (checkpoint.config.num_local_experts, checkpoint.config.intermediate_size) == (4, 32)
    planned = moe_compress.plan(f"shrink {WORDS}", **run_options(source, texts, tmp_path / "plan"))
    assert planned.after.bytes == checkpoint.bytes and planned.form == "plain"
    manifest = json.loads((whole / "moe_compress.json").read_text())
    assert [stage["method"] for stage in manifest["stages"]] == 2 * ["expert_drop", "channels", "distill"]
    assert manifest["base"]["fingerprint"] == open_checkpoint(source).fingerprint
    assert {report["teacher"] for report in manifest["report"] if "teacher" in report} == {str(source)}
    stages = json.loads((whole / "plan.json").read_text())["stages"]
    assert [len(stage["edits"]) for stage in stages] == 2 * [tiny.LAYERS, tiny.LAYERS, 0]
    options = run_options(source, texts, tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer.CheckpointWriter, "copy", stop_at=6)
        moe_compress.compress(f"shrink {WORDS}", **options)
    assert not (tmp_path / "killed" / "out").exists()
    assert outcome(moe_compress.compress(f"shrink {WORDS}", **options).folder) == outcome(whole)
