"""A watch evaluates every finished checkpoint of a training once, whatever happens to it, to them, or to itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_compress
from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.steps import finished_steps, rotate, step_folder, steps_folder, training_step
from moe_compress.evaluation.watching import watch as watching
from moe_compress.evaluation.watching.evaluated import Evaluation, read_evaluations
from moe_compress.evaluation.watching.process import Job
from support.interrupted import Interrupted
from support.watched import KL, LAST, STEPS, number, rows


def test_the_original_and_the_student_before_the_training_come_first(out, watch):
    found, evaluator = watch(out)
    assert evaluator.steps == [None, *STEPS, LAST]
    assert found.exit_code == 0 and rows(found) == [None, *STEPS, LAST]
    kept = [json.loads(path.read_text()) for path in sorted(found.place.glob("*.json"))]
    assert [each["step"] for each in kept] == [None, *STEPS, LAST]
    manifest = read_manifest(step_folder(out, 2)) or {}
    row = kept[2]
    assert row["metrics"]["kl"]["value"] == KL[2] and row["losses"] == manifest["training"]["losses"]
    assert row["tokens"] == manifest["training"]["tokens"] and row["checkpoint"] == manifest["identity"]
    assert [each["final"] for each in kept] == [False] * 4 + [True]
    assert "<svg" in (found.place / "curve.svg").read_text() and not (found.place / "curve.png").exists()
    assert "| step 6" in found.markdown() and "0.3000" in found.markdown()


def test_what_is_not_finished_is_no_checkpoint(out, watch):
    steps_folder(out).joinpath("step-00004").rename(steps_folder(out) / "step-00004.partial")
    (step_folder(out, 3)).mkdir()
    shutil.copytree(step_folder(out, 2), step_folder(out, 5))
    (step_folder(out, 5) / "moe_compress.json").unlink()
    _, evaluator = watch(out)
    assert evaluator.steps == [None, 0, 2, LAST]


def test_none_is_evaluated_twice_under_one_protocol(out, watch):
    watch(out)
    assert watch(out)[1].steps == []
    assert watch(out, every=4)[1].steps == [] and watch(out, best="kl")[1].steps == []
    assert watch(out, eval_samples=2)[1].steps == [None, *STEPS, LAST]
    found, evaluator = watch(out)
    assert evaluator.steps == [] and rows(found) == [None, *STEPS, LAST]


def test_only_some_steps_and_the_last(out, watch):
    assert watch(out, every=4)[1].steps == [None, 0, 4, LAST]
    assert watch(steps_folder(out), every=2)[1].steps == [2]


@pytest.mark.parametrize("at", [None, 0, 2, LAST])
def test_a_watch_that_was_killed_goes_on(out, watch, at):
    def die(job: Job) -> None:
        if at == (None if job.of_original else number(job)):
            raise Interrupted

    with pytest.raises(Interrupted):
        watch(out, die)
    order = [None, *STEPS, LAST]
    found, evaluator = watch(out)
    assert evaluator.steps == order[order.index(at) :] and rows(found) == order
    assert not [*steps_folder(out).glob("held*")]


def test_another_training_in_the_same_place_is_another(out, watch, lab, tmp_path):
    watch(out, best="kl")
    for folder in (out, steps_folder(out), out.with_name("run.best")):
        shutil.rmtree(folder)
    words = f"expert_drop keep=3 + distill steps={LAST} batch=2 checkpoint_every=4 lr=0.02"
    moe_compress.compress(words, **{**lab("mixtral"), "out": str(out)})
    out.rename(out.with_name("apart"))
    found, evaluator = watch(out, best="kl")
    assert evaluator.steps == [None, 0, 4] and rows(found) == [None, 0, 4] and best(out) == 4


def test_the_outcome_of_a_stage_that_is_not_the_last_goes_on_being_held(out, watch):
    def gone(job: Job) -> None:
        shutil.rmtree(out, ignore_errors=True)

    assert watch(out, gone, once=False)[1].steps == [None, *STEPS, LAST]
    assert not out.exists() and [path.name for path in sorted(steps_folder(out).iterdir())] == [
        f"step-{step:05d}" for step in STEPS
    ]


def test_without_steps_the_outcome_alone_is_evaluated(out, watch):
    shutil.rmtree(steps_folder(out))
    assert watch(out)[1].steps == [None, LAST] and not steps_folder(out).exists()


def test_a_row_that_was_changed_is_made_anew(out, watch):
    found, _ = watch(out)
    path = next(found.place.glob("step-00002*"))
    path.write_text(path.read_text().replace("0.5", "0.1"))
    assert watch(out)[1].steps == [2]


# --- rotation ---------------------------------------------------------------------------------------------------


def test_rotation_takes_nothing_that_waits_or_is_being_evaluated(out, watch):
    def turn(_job: Job) -> None:
        rotate(out, 1)
        for each in finished_steps(out)[:1]:
            shutil.rmtree(each.folder)

    found, evaluator = watch(out, turn)
    assert evaluator.steps == [None, *STEPS, LAST] and rows(found) == [None, *STEPS, LAST]
    assert not steps_folder(out).exists()


def test_what_a_killed_watch_held_is_evaluated_though_it_was_rotated_since(out, watch):
    def die(job: Job) -> None:
        if not job.of_original and number(job) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        watch(out, die)
    shutil.rmtree(step_folder(out, 2))
    rotate(out, 1)
    assert watch(out)[1].steps == [2, 4, LAST]


def test_one_that_is_removed_while_it_is_linked_is_left_out(out, watch, monkeypatch, caplog):
    from moe_compress.evaluation.watching import held

    real = held.link_folder

    def link(source: Path, target: Path) -> None:
        if source.name == "step-00002":
            shutil.rmtree(source)
            raise FileNotFoundError(source)
        real(source, target)

    monkeypatch.setattr(held, "link_folder", link)
    assert watch(out)[1].steps == [None, 0, 4, LAST]


# --- while it goes on -------------------------------------------------------------------------------------------


def test_checkpoints_are_evaluated_as_they_appear_in_any_order(out, watch, monkeypatch):
    """The outcome ends the watch; steps come late, and the later one first."""
    apart = out.with_name("apart")
    apart.mkdir()
    for path in (step_folder(out, 2), step_folder(out, 4), out):
        path.rename(apart / path.name)
    coming = ["step-00004", "step-00002", "run"]
    waited = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) % 2 == 0:
            name = coming.pop(0)
            (apart / name).rename(out if name == "run" else steps_folder(out) / name)

    real = watching.Watch
    monkeypatch.setattr(watching, "Watch", lambda *args: real(*args, wait=wait))
    found, evaluator = watch(out, once=False, poll=0.5)
    assert evaluator.steps == [None, 0, 4, 2, LAST] and rows(found) == [None, 0, 2, 4, LAST]
    assert set(waited) == {0.5} and not coming
    svg = (found.place / "curve.svg").read_text()
    assert svg.index("kl, step 0:") < svg.index("kl, step 2:") < svg.index("kl, step 4:")


def test_the_first_checkpoint_is_waited_for(out, watch, monkeypatch):
    apart = out.with_name("apart")
    steps_folder(out).rename(apart)
    out.rename(out.with_name("final"))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            apart.rename(steps_folder(out))
            out.with_name("final").rename(out)

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert watch(out, once=False, poll=0.25)[1].steps == [None, *STEPS, LAST]
    assert slept == [0.25] * 3


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_metrics_are_shown_with_their_steps(out, watch, monkeypatch, kind):
    told: list[tuple[int, float]] = []

    class Tracker:
        def log(self, step: int, values: dict[str, float]) -> None:
            told.append((step, values["kl"]))

        def close(self) -> None:
            told.append((-1, 0.0))

    monkeypatch.setattr(watching, "require_tracker", lambda _: None)
    monkeypatch.setattr(watching, "open_tracker", lambda *_: Tracker())
    watch(out, log=kind)
    assert told == [*((step, KL[step]) for step in (*STEPS, LAST)), (-1, 0.0)]


# --- failures ---------------------------------------------------------------------------------------------------


def failing(wrong: int, times: int) -> Callable[[Job], None]:
    """Fails so often at a step."""
    left = [times]

    def fail(job: Job) -> None:
        if not job.of_original and number(job) == wrong and left[0]:
            left[0] -= 1
            raise ValueError("the device is on fire.")

    return fail


def test_a_failure_is_tried_again_behind_the_others(out, watch):
    found, evaluator = watch(out, failing(2, 2), poll=0.01)
    assert evaluator.steps.count(2) == 3 and found.exit_code == 0
    assert next(each for each in found.evaluations if each.step == 2).attempts == 3


def test_a_failure_is_a_row_and_not_the_end(out, watch):
    found, evaluator = watch(out, failing(2, 99), best="kl")
    assert evaluator.steps.count(2) == watching.ATTEMPTS and found.exit_code == 1
    row = next(each for each in found.evaluations if each.step == 2)
    assert row.error == "the device is on fire." and row.attempts == watching.ATTEMPTS and not row.metrics
    assert "the device is on fire." in found.markdown() and rows(found) == [None, *STEPS, LAST]
    assert not [*steps_folder(out).glob("held*")]
    found, evaluator = watch(out)
    assert evaluator.steps == [2] and found.exit_code == 0, "the next watch tries it anew"


def test_the_pause_before_another_attempt_doubles(out, watch, monkeypatch):
    clock, waited = [0.0], []

    def wait(seconds: float) -> None:
        waited.append(clock[0])
        clock[0] += seconds

    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    real = watching.Watch
    monkeypatch.setattr(watching, "Watch", lambda *args: real(*args, wait=wait))
    times = []

    def fail(job: Job) -> None:
        if not job.of_original and number(job) == 2:
            times.append(clock[0])
            raise OSError("no space left.")

    watch(out, fail, poll=8.0)
    assert times == [0.0, 8.0, 24.0]


# --- the best ---------------------------------------------------------------------------------------------------


def best(out: Path) -> int | None:
    found = training_step(out.with_name("run.best"))
    return None if found is None else found.step


@pytest.mark.parametrize(("metric", "step"), [("kl", 4), ("accuracy", 2), ("perplexity", 0)])
def test_the_best_checkpoint_is_kept(out, watch, metric, step):
    found, _ = watch(out, best=metric)
    assert best(out) == step and found.best is not None and found.best.step == step
    assert f"best by {metric}: step-{step:05d}" in found.markdown()
    shutil.rmtree(steps_folder(out))
    moe_compress.load(out.with_name("run.best"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["results", "run", "run.best"]


def test_a_watch_that_was_killed_before_it_kept_the_best_does_so(out, watch, monkeypatch):
    kept = watching.keep_best

    def die(where: Path, found: Evaluation, folder: Path) -> None:
        if found.step == 4:
            raise Interrupted
        kept(where, found, folder)

    monkeypatch.setattr(watching, "keep_best", die)
    with pytest.raises(Interrupted):
        watch(out, best="kl")
    assert best(out) == 2
    monkeypatch.setattr(watching, "keep_best", kept)
    rotate(out, 1)
    shutil.rmtree(step_folder(out, 4))
    assert watch(out, best="kl")[1].steps == [LAST] and best(out) == 4


def test_another_metric_chooses_anew_from_what_is_there(out, watch):
    watch(out, best="kl")
    assert watch(out, best="accuracy")[1].steps == [] and best(out) == 2


def test_a_foreign_folder_in_the_bests_place_is_left_alone(out, watch):
    place = out.with_name("run.best")
    place.mkdir()
    (place / "mine").write_text("mine")
    with pytest.raises(ValueError, match="something else than a checkpoint of this training"):
        watch(out, best="kl")
    assert (place / "mine").read_text() == "mine"


def test_a_metric_that_none_has_is_named(out, watch):
    with pytest.raises(ValueError, match="best=kll: the evaluations have perplexity, kl, accuracy"):
        watch(out, best="kll")


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "there is no checkpoint of a training in"),
        ({"every": 0}, "every=0: a whole number from 1"),
        ({"limit": "x"}, "limit=x"),
        ({"once": "perhaps"}, "once=perhaps"),
        ({"log": "paper"}, "log=paper"),
        ({"device": "gpu"}, "device=gpu is not a device"),
        ({"nope": 1}, "nope"),
    ],
)
def test_mistakes_are_answered(tmp_path, watch, words, said):
    with pytest.raises(ValueError, match=said):
        watch(tmp_path / "nowhere", **words)


def test_a_checkpoint_of_no_training_is_not_watched(made, watch):
    with pytest.raises(ValueError, match="there is no checkpoint of a training"):
        watch(made("mixtral", "expert_drop keep=3"), once=False)


@pytest.mark.slow
def test_tasks_that_there_are_not_end_it_at_once(out, watch):
    with pytest.raises(ValueError, match="unknown task 'nothing'"):
        watch(out, tasks="nothing")


def test_evaluations_of_other_kinds_are_passed_over(tmp_path, caplog):
    (tmp_path / "x.json").write_text("{}")
    assert read_evaluations(tmp_path) == {}
