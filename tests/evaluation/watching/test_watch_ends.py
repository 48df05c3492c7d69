"""A watch ends when its training has ended, however that was, and goes on while it may come back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moe_compress.checkpoints.life_signs import LifeSign, sign_file
from moe_compress.checkpoints.steps import step_folder, steps_folder, training_step
from moe_compress.evaluation.watching import watch as watching
from moe_compress.evaluation.watching.process import Job
from support.watched import LAST, STEPS, number, rows


def say(out: Path, state: str, reason: str = "") -> None:
    run = next(step.run for folder in (out, step_folder(out, 0)) if (step := training_step(folder)) is not None)
    sign = LifeSign(run=run, state=state, reason=reason, process=1, host="here", started="")  # type: ignore[arg-type]
    sign_file(out).write_text(json.dumps(dataclasses.asdict(sign)))


def test_a_training_that_failed_ends_the_watch_once_all_that_is_there_is_evaluated(out, watch):
    shutil.rmtree(out)
    say(out, "failed", "the loss is no number.")
    found, evaluator = watch(out, once=False)
    assert evaluator.steps == [None, *STEPS] and found.exit_code == 1
    assert found.ended == "the training failed: the loss is no number." and found.ended in found.markdown()


def test_a_training_that_was_killed_ends_the_watch_after_the_timeout(out, watch):
    shutil.rmtree(out)
    say(out, "runs")
    found, evaluator = watch(out, once=False, poll=0.01, timeout=0.05)
    assert evaluator.steps == [None, *STEPS] and found.exit_code == 1 and "no sign of life" in found.ended


def test_a_training_that_is_started_again_goes_on_being_watched(out, watch, monkeypatch):
    out.rename(out.with_name("apart"))
    say(out, "runs")
    waited = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            out.with_name("apart").rename(out)
            say(out, "finished")

    real = watching.Watch
    monkeypatch.setattr(watching, "Watch", lambda *args: real(*args, wait=wait))
    found, evaluator = watch(out, once=False, poll=0.01)
    assert evaluator.steps == [None, *STEPS, LAST] and len(waited) == 3 and not found.ended and found.exit_code == 0


def test_a_training_that_finished_is_not_waited_for_though_its_outcome_went(out, watch):
    say(out, "finished")
    shutil.rmtree(out)
    found, evaluator = watch(out, once=False)
    assert evaluator.steps == [None, *STEPS] and found.exit_code == 0 and not found.ended


def test_a_training_that_failed_before_its_first_checkpoint_is_a_sentence(out, watch):
    say(out, "failed", "there is no text.")
    for folder in (out, *(step_folder(out, step) for step in STEPS)):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"no checkpoint in .*: the training failed: there is no text\."):
        watch(out, once=False)
    sign_file(out).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .*: no training has begun, for .* \(timeout=0\.01\)"):
        watch(out, once=False, timeout=0.01)


def test_a_folder_of_something_else_is_not_waited_for(out, watch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("mine")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "text"):
        with pytest.raises(ValueError, match="there is no checkpoint of a training"):
            watch(folder, once=False)


@pytest.mark.parametrize("once", [True, False])
def test_a_training_that_is_removed_while_it_is_watched_is_a_row_and_the_end(out, watch, once):
    say(out, "runs")

    def gone(job: Job) -> None:
        if not job.of_original and number(job) == 2:
            for folder in (out, steps_folder(out)):
                shutil.rmtree(folder)
            raise ValueError("it is not a folder.")

    found, evaluator = watch(out, gone, once=once, poll=0.01, best="kl")
    assert evaluator.steps == [None, 0, 2] and rows(found) == [None, 0, 2] and found.exit_code == 1
    assert once or "is gone: the training ended" in found.ended


@pytest.mark.parametrize("words", [{"poll": -1.0}, {"timeout": "nan"}])
def test_times_that_cannot_be_waited_are_refused(out, watch, words):
    with pytest.raises(ValueError, match=f"{next(iter(words))}=.*: seconds, a number from 0 up, are needed"):
        watch(out, **words)
