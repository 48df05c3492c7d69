"""The process that evaluates: the same numbers as `evaluate` and `tasks`, and an end of it is a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moe_compress
from moe_compress.checkpoints.steps import step_folder
from moe_compress.evaluation.watching import process
from moe_compress.evaluation.watching.evaluated import with_tasks
from moe_compress.evaluation.watching.process import Evaluator, Job, evaluate_job


@pytest.fixture(scope="module")
def told(lab) -> dict[str, Any]:
    return {key: value for key, value in lab("mixtral").items() if key != "model"}


@pytest.fixture(scope="module")
def step(lab, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    words = "expert_drop keep=3 + distill steps=3 batch=2 checkpoint_every=2"
    moe_compress.compress(words, **{**lab("mixtral"), "out": str(out)})
    return step_folder(out, 2)


def job(step: Path, told: dict[str, Any], place: Path, **given: Any) -> Job:
    values = {"of_original": False, "original": None, "tasks": "", "limit": None, **given}
    return Job(folder=step, options=told, place=place, **values)


def test_it_measures_what_evaluate_does(step, told, tmp_path):
    evaluated = moe_compress.evaluate(step, **told)
    assert evaluated.record is not None and evaluated.original is not None
    for of_original, record in ((False, evaluated.record), (True, evaluated.original)):
        found = evaluate_job(job(step, told, tmp_path, of_original=of_original))
        assert found["metrics"] == {name: each.model_dump(mode="json") for name, each in record.metrics.items()}
        assert (tmp_path / "records" / f"{found['record']}.json").is_file()
    assert {"kl", "perplexity"} <= evaluate_job(job(step, told, tmp_path))["metrics"].keys()
    (table,) = moe_compress.table(tmp_path / "records")
    assert any("step=2" in name for name in table.cells.column("recipe")), "steps are rows of their own"


@pytest.mark.slow  # what it is asked is answered here above, and how it is asked, by a smaller process below
def test_another_process_evaluates_as_this_one_does(step, told, tmp_path):
    with Evaluator(1) as evaluate:
        assert evaluate(job(step, told, tmp_path)) == evaluate_job(job(step, told, tmp_path))
        with pytest.raises(ValueError, match=r"holds no config\.json"):
            evaluate(job(tmp_path, told, tmp_path))
        running = evaluate.process
    assert evaluate.process is None and running is not None and running.poll() is not None


ANSWERS = """
import os, signal, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
while True:
    asked = connection.recv()
    if asked == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    connection.send((True, {"asked": asked, "process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}))
"""


def test_a_process_that_ends_is_a_sentence_and_the_next_goes_on(monkeypatch):
    monkeypatch.setattr(process, "START", ANSWERS)
    with Evaluator(3) as evaluate:
        ask: Any = evaluate
        first, second = ask(1), ask(2)
        assert first["process"] == second["process"] and first["threads"] == "3"
        with pytest.raises(ValueError, match=r"ended early \(exit code -9\)"):
            ask("die")
        third = ask(3)
        assert third["asked"] == 3 and third["process"] != first["process"]


@pytest.mark.slow
def test_it_asks_tasks_as_the_command_does(step, told, tmp_path):
    report = moe_compress.tasks(step, "local", limit=3, **told)
    found = evaluate_job(job(step, told, tmp_path, tasks="local", limit=3))["metrics"]
    assert found["accuracy"] == report.average["after"]
    for name, task in report.tasks.items():
        assert found[f"accuracy_{name}"] == task["after"]
    original = evaluate_job(job(step, told, tmp_path, tasks="local", limit=3, of_original=True))["metrics"]
    assert original["accuracy"] == report.average["before"]


def test_accuracy_is_of_what_was_asked():
    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "unit": "fraction", "interval": None}

    measured = {"task_accuracy": metric(0.1)}
    one = {"tasks": {"x": {"before": metric(0.2), "after": metric(0.3)}}, "average": None}
    several = {**one, "average": {"before": metric(0.4), "after": metric(0.5)}}
    assert with_tasks({}, None, "after") == {}
    assert with_tasks(measured, None, "after")["accuracy"] == metric(0.1)
    assert with_tasks(measured, one, "after")["accuracy"] == metric(0.3)
    assert with_tasks(measured, several, "before")["accuracy"] == metric(0.4)
