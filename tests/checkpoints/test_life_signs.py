"""A training shows that it lives, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_compress
from moe_compress.checkpoints import life_signs
from moe_compress.checkpoints.life_signs import living, read_sign, sign_file
from moe_compress.checkpoints.steps import step_folder, steps_folder
from moe_compress.utils.files import NoSpaceError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Of a training that has written a checkpoint."""
    step_folder(tmp_path / "run", 0).mkdir(parents=True)
    return tmp_path / "run"


def state(out: Path) -> tuple[str, str, str] | None:
    found = read_sign(out)
    return found and (found[0].run, found[0].state, found[0].reason)


def test_it_says_that_it_runs_and_that_it_finished(out):
    with living({out: "abc"}):
        assert state(out) == ("abc", "runs", "")
    assert state(out) == ("abc", "finished", "")


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("no\n such text"), "failed"), (NoSpaceError("no\n such text"), "stopped")]
)
def test_it_says_why_it_failed(out, error, expected):
    with pytest.raises(ValueError, match="no"), living({out: "abc"}):
        raise error
    assert state(out) == ("abc", expected, "no such text")


def test_one_that_was_interrupted_says_nothing_more(out):
    with pytest.raises(KeyboardInterrupt), living({out: "abc"}):
        raise KeyboardInterrupt
    assert state(out) == ("abc", "runs", "")


def test_a_sign_that_would_be_alone_goes(tmp_path):
    with living({tmp_path / "run": "abc"}):
        assert state(tmp_path / "run")
    assert not steps_folder(tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no"), living({tmp_path / "run": "abc"}):
        raise ValueError("no")
    assert not [*tmp_path.iterdir()]


def test_it_is_touched_while_it_lives_and_no_longer(out, monkeypatch):
    monkeypatch.setattr(life_signs, "BEAT_SECONDS", 0.01)
    with living({out: "abc"}):
        first = sign_file(out).stat().st_mtime_ns
        time.sleep(0.1)
        assert sign_file(out).stat().st_mtime_ns > first
    last = sign_file(out).stat().st_mtime_ns
    time.sleep(0.05)
    assert sign_file(out).stat().st_mtime_ns == last


@pytest.mark.parametrize("broken", ["{", "[]", '{"run": "abc"}', '{"other": 1}'])
def test_what_is_no_sign_counts_for_none(out, broken):
    assert read_sign(out) is None
    sign_file(out).write_text(broken)
    assert read_sign(out) is None


def test_a_folder_that_goes_meanwhile_does_not_end_the_training(out, monkeypatch):
    monkeypatch.setattr(life_signs, "BEAT_SECONDS", 0.01)
    with living({out: "abc"}):
        sign_file(out).unlink()
        time.sleep(0.05)
    assert state(out) == ("abc", "finished", "")


def test_a_recipe_shows_it_of_each_training_in_it(
    options: dict[str, object], reader_folder: Callable[[str], Path], tmp_path: Path
):
    told = {**options, "model": str(reader_folder("mixtral")), "eval": False, "out": str(tmp_path / "run")}
    words = "expert_drop keep=3 + distill steps=2 batch=2 checkpoint_every=1 + layerwise steps=1 + router_kd steps=1"
    folder = moe_compress.compress(words, **told).folder
    assert folder is not None and not steps_folder(folder).exists(), "one without checkpoints leaves nothing"
    left = read_sign(tmp_path / "run.stage2")
    assert left is not None and left[0].state == "finished" and read_sign(tmp_path / "run.stage3") is None


def test_a_training_that_failed_says_why(
    options: dict[str, object], reader_folder: Callable[[str], Path], tmp_path: Path
):
    told = {**options, "model": str(reader_folder("mixtral")), "eval": False, "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="is no number"):
        moe_compress.compress("expert_drop keep=3 + distill lr=1e20 clip=0 checkpoint_every=2", **told)
    left = read_sign(tmp_path / "run")
    assert left is not None and left[0].state == "failed" and "is no number" in left[0].reason
