"""Runs of `factorise` that are stopped, killed or run again give the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.compression.weights import factor_sizes, factor_stage
from moe_compress.engine import forward
from support import killed, tiny
from support.interrupted import Interrupted, counting, leftovers, outcome, outcomes, stopped_run
from support.pruned import report
from support.slow import slow_after

STOPPED = {
    "plain": "factorise structure=svd",
    "shared out": "factorise structure=base_delta budget=global weigh=uniform sweeps=2",
    "turns": "factorise structure=shared_basis experts_at_once=3 propagate=original",
    "both": "factorise structure=svd budget=global weigh=uniform experts_at_once=3",
    "weighed": "factorise structure=svd budget=global weigh=gradient",
    "aligned": "factorise align=true grams=pooled sweeps=2",
    "nothing": "factorise structure=svd objective=plain",
}
# Runs of a layer per layer, and of all layers before the first of them.
RUNS_PER_LAYER = {"plain": 2, "shared out": 2, "turns": 3, "both": 4, "aligned": 2, "nothing": 0}
SURVEY = {"shared out": tiny.LAYERS, "both": 3 * tiny.LAYERS}


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], dict[str, Any]]]:
    """name -> the outcome of its recipe and what is reported, never interrupted."""
    return outcomes(STOPPED, lab("mixtral"), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "name", slow_after(3, ["plain", "both", "weighed", "aligned", "shared out", "turns", "nothing"])
)
def test_two_runs_write_the_same_bytes(name, lab, whole, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(STOPPED[name], **options).folder
    one, other = whole(name)[0], outcome(folder)
    assert [file for file in one if one[file] != other.get(file)] == [] and report(folder) == whole(name)[1]


@pytest.mark.parametrize(
    ("name", "call"),
    slow_after(
        5,
        [
            *(("plain", 3), ("shared out", 2), ("shared out", 5), ("turns", 4), ("both", 14)),
            *(("plain", 0), ("plain", 5), ("shared out", 0), ("turns", 8), ("both", 4), ("both", 20), ("aligned", 3)),
        ],
    ),
)
def test_a_stopped_run_goes_on_at_its_layer(name, call, lab, whole, monkeypatch, tmp_path):
    """One that was stopped while ranks were shared out begins that anew."""
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, _, folder = stopped_run(STOPPED[name], (forward.hf, "run_layer", call), options, monkeypatch)
    each, survey = RUNS_PER_LAYER[name], SURVEY.get(name, 0)
    left = tiny.LAYERS - max(0, call - survey) // each
    assert layers == left * each + (survey if call < survey else 0)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "shard"), slow_after(2, [("plain", 2), ("nothing", 1), ("plain", 0), ("plain", 3), ("nothing", 3)])
)
def test_a_stopped_run_goes_on_at_its_shard(name, shard, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run(STOPPED[name], (writer, "write_shard", shard), options, monkeypatch)
    assert written == tiny.LAYERS + 1 - shard
    assert layers == RUNS_PER_LAYER[name] * (tiny.LAYERS - max(0, shard - 1))
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "place", "number"),
    slow_after(
        2,
        [
            *(("shared out", factor_sizes, 0), ("plain", factor_stage, 1), ("plain", factor_stage, 2)),
            *(("nothing", factor_stage, 0), ("both", factor_stage, 1)),
        ],
    ),
)
def test_a_run_stopped_between_a_layer_and_its_notes_goes_on(name, place, number, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run(STOPPED[name], (place, "write_json", number), options, monkeypatch)
    done = 0 if place is factor_sizes else number
    assert written == tiny.LAYERS + (place is factor_sizes) - done
    assert layers >= RUNS_PER_LAYER[name] * (tiny.LAYERS - done)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]


@pytest.mark.parametrize("call", slow_after(1, [5, 2, 8, 11]))
def test_a_run_stopped_while_gradients_are_measured_goes_on(call, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    _, _, folder = stopped_run(STOPPED["weighed"], (forward.hf, "run_layer", call), options, monkeypatch)
    assert outcome(folder) == whole("weighed")[0] and report(folder) == whole("weighed")[1]
    assert leftovers(tmp_path) == []


def test_another_recipe_s_sizes_are_not_taken(lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=5)
        moe_compress.compress(f"{STOPPED['shared out']} ratio=0.4", **options)
    folder = moe_compress.compress(STOPPED["shared out"], **options).folder
    assert outcome(folder) == whole("shared out")[0] and report(folder) == whole("shared out")[1]


@pytest.mark.slow  # the runs stopped above, by an exception, begin and end in the same places
def test_kill_9(lab, whole, tmp_path):
    """Killed by the system at a layer, in the middle of writes and at a moment of its own."""
    points = [("plain", "write", 60), ("both", "layer", 14), ("both", "write", 12), ("shared out", "time", 300)]
    jobs = []
    for n, (name, point, number) in enumerate(points):
        place = {"out": str(tmp_path / str(n) / "out"), "results": str(tmp_path / str(n))}
        jobs.append((point, number, STOPPED[name], {**lab("mixtral"), **place}))
    done = subprocess.run(
        [sys.executable, str(Path(killed.__file__)), json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == len(jobs), done.stderr
    for n, ((name, point, number), (ended_by, layers)) in enumerate(zip(points, lines, strict=True)):
        each, survey = RUNS_PER_LAYER[name], SURVEY.get(name, 0)
        assert point == "time" or ended_by == signal.SIGKILL, (name, point)
        assert point != "layer" or layers == each * (tiny.LAYERS - (number - survey) // each)
        assert outcome(tmp_path / str(n) / "out") == whole(name)[0], (name, point)
        assert leftovers(tmp_path / str(n)) == [], (name, point)
