"""Trackers show numbers over steps; they are imported where they are asked for, and missed in one sentence."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moe_compress
from moe_compress.run import trackers
from moe_compress.run.trackers import open_tracker, require_tracker


class StandIn:
    """Stands for a run of wandb, or for a writer of TensorBoard: keeps what it is told."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.metrics, self.finished = given, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logged.append({"step": step, name: value})

    def finish(self) -> None:
        self.finished = True

    close = finish


@pytest.fixture
def made(monkeypatch) -> list[StandIn]:
    """What was opened, of stand-ins for both packages."""
    found: list[StandIn] = []

    def opened(*args: Any, **given: Any) -> StandIn:
        found.append(StandIn(args=args, **given))
        return found[-1]

    for name, attribute in (("wandb", "init"), ("tensorboard", "x"), ("torch.utils.tensorboard", "SummaryWriter")):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        setattr(module, attribute, opened)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_wandb_is_told_the_step_as_a_number_of_its_own(made, tmp_path):
    tracker = open_tracker("wandb", tmp_path, "name", "abc", "training")
    assert tracker is not None
    for step in (2, 1):
        tracker.log(step, {"logits": 0.5})
    tracker.close()
    (run,) = made
    assert run.given["id"] == "abc-training" and run.given["resume"] == "allow" and run.given["dir"] == str(tmp_path)
    assert run.metrics == [("training/step", None), ("training/*", "training/step")]
    assert run.logged == [{"training/step": step, "training/logits": 0.5} for step in (2, 1)] and run.finished


def test_tensorboard_is_given_the_step(made, tmp_path):
    tracker = open_tracker("tensorboard", tmp_path, "name", "abcdefgh", "evaluation")
    assert tracker is not None
    tracker.log(3, {"kl": 0.25})
    tracker.close()
    (writer,) = made
    assert writer.given["args"] == (str(tmp_path / "tensorboard" / "name-abcdef"),)
    assert writer.logged == [{"step": 3, "evaluation/kl": 0.25}] and writer.finished


def test_a_training_tells_its_tracker_of_every_step(made, options, reader_folder):
    told = {**options, "model": str(reader_folder("mixtral")), "eval": False}
    moe_compress.compress("expert_drop keep=3 + distill steps=3 log=wandb", **told)
    (run,) = made
    assert [line["training/step"] for line in run.logged] == [1, 2, 3] and run.finished
    assert {"training/logits", "training/tokens_per_second", "training/lr"} <= run.logged[0].keys()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_without_the_package_one_sentence_says_what_to_install(kind, monkeypatch, refused, reader_folder):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    said = refused(f"expert_drop keep=3 + distill steps=2 log={kind}", model=str(reader_folder("mixtral")))
    assert said == f"log={kind} needs {kind}, which is not installed: pip install 'moe-compress[{kind}]'."
    require_tracker("jsonl")


def test_neither_is_imported_where_nobody_asks(tmp_path):
    code = (
        "import sys; from moe_compress.run.trackers import open_tracker; from pathlib import Path\n"
        "assert open_tracker('jsonl', Path('x'), 'n', 'i', 'training') is None\n"
        "assert not {'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", tmp_path, "name", "abcdefgh", "training")
    assert tracker is not None
    for step in (2, 1):
        tracker.log(step, {"loss": step / 4})
    tracker.close()
    events = EventAccumulator(str(next((Path(tmp_path) / "tensorboard").iterdir()))).Reload()
    assert [(each.step, each.value) for each in events.Scalars("training/loss")] == [(2, 0.5), (1, 0.25)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_what_it_is_told_where_it_is_offline(tmp_path):
    code = (
        "from moe_compress.run.trackers import open_tracker; from pathlib import Path\n"
        "tracker = open_tracker('wandb', Path('logs'), 'name', 'abcdefgh', 'training')\n"
        "tracker.log(2, {'loss': 0.5}); tracker.log(1, {'loss': 0.625}); tracker.close()"
    )
    offline = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("logs/wandb/offline-run-*-abcdefgh-training/*.wandb")
    kept = file.read_bytes()
    assert kept.count(b"training/loss") >= 2 and b"0.625" in kept and b"0.5" in kept
