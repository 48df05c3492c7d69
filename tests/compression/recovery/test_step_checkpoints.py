"""The student so far, as ordinary checkpoints: whole or not there, none lost or repeated, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints import steps as steps_module
from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.life_signs import SIGN
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.checkpoints.steps import finished_steps, require_own_steps, step_folder, steps_folder
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.preflight import bytes_to_write
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.recipes.parser import parse
from support.interrupted import Interrupted, counting, outcome

RECIPE = "expert_drop keep=3 + distill steps=6 batch=2 lr=0.01 keep=2"


@pytest.fixture
def told(options: dict[str, object], reader_folder: Callable[[str], Path], tmp_path: Path) -> dict[str, object]:
    return {**options, "model": str(reader_folder("mixtral")), "eval": False, "out": str(tmp_path / "run")}


def there(out: object) -> list[int]:
    return [each.step for each in finished_steps(Path(str(out)))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(folder)
    with opened.read(list(opened.tensors)) as tensors:
        return {key: tensor[...].clone() for key, tensor in tensors.items()}


def test_the_outcome_is_the_same_with_and_without(told, tmp_path):
    followed = moe_compress.compress(RECIPE, "checkpoint_every=2", **told).folder
    alone = moe_compress.compress(RECIPE, **{**told, "out": str(tmp_path / "alone")}).folder
    assert there(followed) == [0, 2, 4] and not steps_folder(alone).exists()
    assert outcome(followed) == outcome(alone)
    curves = [(read_manifest(each) or {})["report"][-1]["training"]["curve"] for each in (followed, alone)]
    assert curves[0] == curves[1]


def test_they_are_ordinary_checkpoints_of_the_student_so_far(told, tmp_path):
    out = moe_compress.compress(RECIPE, "checkpoint_every=4", **told).folder
    shorter = moe_compress.compress(
        RECIPE, "checkpoint_every=2", "distill.warmup=0", **{**told, "out": str(tmp_path / "other")}
    ).folder
    manifest = read_manifest(step_folder(out, 4)) or {}
    final = read_manifest(out) or {}
    assert manifest["training"] == {
        **final["training"],
        "step": 4,
        "tokens": 4 * 32,
        "losses": manifest["training"]["losses"],
    }
    assert manifest["training"]["run"] == final["identity"] == final["training"]["run"] != manifest["identity"]
    assert manifest["base"] == final["base"] and manifest["stages"][-1]["given"]["step"] == 4
    at_first, later, last = (weights(each) for each in (step_folder(out, 0), step_folder(out, 4), out))
    assert at_first.keys() == last.keys() and any(not torch.equal(at_first[key], later[key]) for key in last)
    assert any(not torch.equal(later[key], last[key]) for key in last)
    first, start = weights(step_folder(shorter, 0)), at_first
    assert all(torch.equal(first[key], start[key]) for key in start), "step 0 is the student before the training"
    moe_compress.load(step_folder(out, 4))


@pytest.mark.parametrize(("words", "since"), [(["checkpoint_every=4"], {4: 0, 6: 4}), ([], {6: 0})])
def test_losses_are_means_since_the_checkpoint_before(told, words, since):
    out = moe_compress.compress(RECIPE, *words, **told).folder
    curve = (read_manifest(out) or {})["report"][-1]["training"]["curve"]["logits"]
    assert len(curve) == 6 and len(set(curve)) > 1
    for step, start in since.items():
        losses = (read_manifest(out if step == 6 else step_folder(out, step)) or {})["training"]["losses"]
        assert losses["logits"] == pytest.approx(sum(curve[start:step]) / (step - start), rel=1e-5)


def test_the_oldest_go_and_the_first_stays(told):
    out = moe_compress.compress(RECIPE, "checkpoint_every=1", "keep_checkpoints=2", **told).folder
    assert there(out) == [0, 4, 5]
    assert {path.name for path in steps_folder(out).iterdir()} == {"step-00000", "step-00004", "step-00005", SIGN}


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_a_run_that_was_stopped_neither_loses_nor_repeats_one(told, tmp_path, monkeypatch, stop_at):
    whole = moe_compress.compress(RECIPE, "checkpoint_every=2", **{**told, "out": str(tmp_path / "whole")}).folder
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, DistillationRun, "step", stop_at=stop_at)
        moe_compress.compress(RECIPE, "checkpoint_every=2", **told)
    before = {each.step: each.folder.stat().st_ino for each in finished_steps(Path(str(told["out"])))}
    out = moe_compress.compress(RECIPE, "checkpoint_every=2", **told).folder
    assert there(out) == [0, 2, 4]
    assert before.items() <= {each.step: each.folder.stat().st_ino for each in finished_steps(out)}.items()
    assert outcome(out) == outcome(whole)
    for one, other in zip(finished_steps(out), finished_steps(whole), strict=True):
        assert outcome(one.folder) == outcome(other.folder)


@pytest.mark.parametrize("point", [(CheckpointWriter, "finish", 2), (steps_module, "remove_folder", 0)])
def test_a_run_that_was_stopped_between_two_files_leaves_nothing_unfinished(told, monkeypatch, point):
    place, name, number = point
    words = ("checkpoint_every=2", "keep_checkpoints=1")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, name, stop_at=number)
        moe_compress.compress(RECIPE, *words, **told)
    out = moe_compress.compress(RECIPE, *words, **told).folder
    assert {path.name for path in steps_folder(out).iterdir()} == {"step-00000", "step-00004", SIGN}


def test_what_is_being_written_is_none(told, tmp_path):
    out = moe_compress.compress(RECIPE, "checkpoint_every=4", **told).folder
    step_folder(out, 4).rename(steps_folder(out) / "step-00004.partial")
    assert there(out) == [0]
    (step_folder(out, 2)).mkdir()
    (step_folder(out, 3)).mkdir()
    (step_folder(out, 3) / "moe_compress.json").write_text("{")
    assert there(out) == [0]


def test_steps_of_another_training_are_not_mixed_with_these(told):
    out = moe_compress.compress(RECIPE, "checkpoint_every=4", **told).folder
    require_own_steps(out, str((read_manifest(out) or {})["identity"]))
    out.rename(out.with_name("moved"))
    with pytest.raises(ValueError, match="checkpoints of another training"):
        moe_compress.compress(RECIPE, "checkpoint_every=4", "distill.lr=0.02", **told)


def test_edited_students_have_them_too(told):
    out = moe_compress.compress("expert_drop keep=3 budget=global + distill steps=3 checkpoint_every=2", **told).folder
    assert (read_manifest(step_folder(out, 2)) or {})["form"] == (read_manifest(out) or {})["form"]
    moe_compress.load(step_folder(out, 2))


def test_what_says_only_how_a_training_is_followed_is_in_no_name(told, tmp_path):
    recipe = parse(RECIPE, ["checkpoint_every=2", "keep_checkpoints=1", "log=tensorboard"], told)
    assert "checkpoint" not in recipe.to_yaml() and "log" not in recipe.stages[1].explicit_parameters
    with pytest.raises(ValueError, match="keep_checkpoints=1 would do nothing"):
        parse(RECIPE, ["keep_checkpoints=1"], told)
    with pytest.raises(ValueError, match="checkpoint_every"):
        parse("layerwise", ["checkpoint_every=1"], told)


def test_disk_is_asked_for_all_that_are_there_at_a_time(told, tmp_path):
    def needed(*words: str) -> int:
        expected = moe_compress.plan(RECIPE, *words, **told)
        return bytes_to_write(parse(RECIPE, list(words), told), expected, tmp_path / "x") // expected.after.bytes

    more = [needed(f"checkpoint_every={n}") - needed() for n in (6, 3, 2, 1)]
    assert more == [1, 2, 3, 6]
    assert needed("checkpoint_every=1", "keep_checkpoints=2") - needed() == 4


def test_every_step_is_a_line_of_the_log(told):
    moe_compress.compress(RECIPE, "checkpoint_every=4", **told)
    log = next((Path(str(told["results"])) / "logs").glob("*.jsonl"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 and line["losses"]["logits"] > 0 for line in steps)
    assert [line["step"] for line in lines if line["event"] == "checkpoint"] == [0, 4]
