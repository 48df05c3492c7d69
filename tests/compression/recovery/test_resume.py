"""Recoveries that are stopped or killed at any step give the same bytes and the same curves when run again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.compression.recovery import layer_pairs, training_state
from moe_compress.compression.recovery.trained_weights import Optimiser
from support import killed
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.recovered import reports
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4 + "
RECIPES = {
    "distill": DROP + "distill steps=6 keep=2 batch=3 train=all loss=logits,hidden,router",
    "router_kd": DROP + "router_kd steps=5 keep=1 batch=4",
    "layerwise": DROP + "layerwise steps=3 batch=4",
    "ridge": DROP + "router_kd solver=ridge",
}
STEPS = {"distill": 6, "router_kd": 5, "layerwise": 9}


def what_was_said(folder: Path) -> Any:
    """The report but for its seconds."""
    found = reports(folder)[-1]
    if "training" in found:
        found["training"].pop("seconds")
    found["recovery"].pop("processor_seconds")
    return found


@pytest.fixture(scope="module")
def whole(lab, made) -> Callable[[str], tuple[dict[str, bytes], Any]]:
    """name -> the outcome of its recipe and what is reported, never interrupted."""
    return lambda name: (outcome(made("mixtral", RECIPES[name])), what_was_said(made("mixtral", RECIPES[name])))


def own(lab, place: Path) -> dict[str, Any]:
    """Options of a run with results of its own."""
    return {**lab("mixtral"), "results": str(place), "out": str(place / "out")}


def require_same(place: Path, expected: tuple[dict[str, bytes], Any]) -> None:
    """The bytes and the report of a run that was never stopped, and nothing left over."""
    found = outcome(place / "out")
    assert [file for file in expected[0] if found.get(file) != expected[0][file]] == []
    assert what_was_said(place / "out") == expected[1] and leftovers(place) == []


@pytest.mark.parametrize("name", slow_after(1, list(RECIPES)))
def test_two_runs_write_the_same_bytes(name, lab, whole, tmp_path):
    moe_compress.compress(RECIPES[name], **own(lab, tmp_path))
    require_same(tmp_path, whole(name))


@pytest.mark.parametrize(
    ("name", "step", "left"),
    slow_after(
        2,
        [("distill", 3, 4), ("layerwise", 4, 6), ("router_kd", 4, 1)]
        + [("distill", step, 6 - step // 2 * 2) for step in (0, 1, 2, 4, 5)]
        + [("layerwise", step, 9 - step // 3 * 3) for step in (0, 2, 3, 8)],
    ),
)
def test_a_stopped_run_goes_on_behind_the_step_that_was_kept(name, step, left, lab, whole, monkeypatch, tmp_path):
    """`keep=`: of every so many steps of distill; of layerwise, a layer."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=step)
        moe_compress.compress(RECIPES[name], **own(lab, tmp_path))
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        steps = counting(patch, Optimiser, "step")
        moe_compress.compress(RECIPES[name], **own(lab, tmp_path))
    assert len(steps) == left
    require_same(tmp_path, whole(name))


@pytest.mark.parametrize(
    ("name", "place", "function", "call"),
    slow_after(
        1,
        [
            ("ridge", layer_pairs, "save_streams", 1),
            ("distill", writer, "write_shard", 6),
            ("layerwise", layer_pairs, "save_streams", 0),
            ("layerwise", writer, "write_shard", 5),
            ("distill", training_state, "write_shard", 2),
            ("ridge", layer_pairs, "run_batches", 7),
        ],
    ),
)
def test_a_run_stopped_between_writes_goes_on(name, place, function, call, lab, whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, function, stop_at=call)
        moe_compress.compress(RECIPES[name], **own(lab, tmp_path))
    moe_compress.compress(RECIPES[name], **own(lab, tmp_path))
    require_same(tmp_path, whole(name))


def test_the_processor_s_time_of_killed_processes_counts(tmp_path):
    first = training_state.Spent(tmp_path / "spent.json")
    while first.seconds < 0.02:
        sum(range(1000))
    first.keep()
    assert training_state.Spent(tmp_path / "spent.json").seconds > 0.02


@pytest.mark.slow
def test_a_broken_state_counts_for_nothing(lab, whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=5)
        moe_compress.compress(RECIPES["distill"], **own(lab, tmp_path))
    (state,) = tmp_path.rglob("training-float32.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    moe_compress.compress(RECIPES["distill"], **own(lab, tmp_path))
    require_same(tmp_path, whole("distill"))


@pytest.mark.slow
def test_other_words_begin_anew(lab, made, monkeypatch, tmp_path):
    """What a run of another learning rate left is not gone on with."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=5)
        moe_compress.compress(RECIPES["distill"] + " lr=0.01", **own(lab, tmp_path))
    moe_compress.compress(RECIPES["distill"], **own(lab, tmp_path))
    assert outcome(tmp_path / "out") == outcome(made("mixtral", RECIPES["distill"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on(name, lab, whole, tmp_path):
    """Killed by the system at every kind of point, in the middle of writes and at a random moment."""
    seed = random.SystemRandom().randrange(1000)
    points = [("write", 30), ("write", 60), ("time", random.Random(seed).randrange(20, 600))]
    points += [("step", number) for number in range(STEPS.get(name, 0))]
    options = [own(lab, tmp_path / str(n)) for n in range(len(points))]
    jobs = [(*point, RECIPES[name], given) for point, given in zip(points, options, strict=True)]
    done = subprocess.run(
        [sys.executable, str(Path(killed.__file__)), json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    ended = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(ended) == len(jobs), done.stderr
    for n, (point, by) in enumerate(zip(points, ended, strict=True)):
        assert point[0] == "time" or by == signal.SIGKILL, point
        assert torch.get_num_threads() == 1
        require_same(tmp_path / str(n), whole(name))
