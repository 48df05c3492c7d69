"""Interrupted runs: the same command again gives the same weights, config and plan, and does not begin anew."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.calibration import artefact
from moe_compress.checkpoints import writer
from moe_compress.engine import forward
from support import killed, tiny
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.slow import slow_after, slow_unless

Options = dict[str, object]
RECIPES = {
    "mixtral": "expert_drop keep=6 + expert_drop score=easy_ep budget=global ratio=0.25",
    "deepseek_v3": "expert_drop score=man keep=4",
}


@pytest.fixture(scope="session")
def whole(
    reader_folder: Callable[[str], Path], texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """family -> the outcome of its recipe, never interrupted."""
    made: dict[str, dict[str, bytes]] = {}

    def of(family: str) -> dict[str, bytes]:
        if family not in made:
            results = tmp_path_factory.mktemp("whole")
            options = run_options(reader_folder(family), texts, results)
            made[family] = outcome(moe_compress.compress(RECIPES[family], **options).folder)
        return made[family]

    return of


def run_options(model: Path, texts: Path, results: Path) -> Options:
    files = {"data": str(texts / "calibration.txt"), "out": str(results / "out"), "results": str(results)}
    return {"model": str(model), "samples": 8, "length": 16, "eval": False, **files}


@pytest.mark.parametrize("layer", slow_after(1, range(tiny.LAYERS)))
def test_calibration_goes_on_at_the_boundary(layer, reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("deepseek_v3"), texts, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=layer)
        moe_compress.compress(RECIPES["deepseek_v3"], **options)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        calls = counting(patch, forward.hf, "run_layer")
        folder = moe_compress.compress(RECIPES["deepseek_v3"], **options).folder
    assert len(calls) == tiny.LAYERS - layer
    assert outcome(folder) == whole("deepseek_v3")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("shard", slow_after(2, range(tiny.LAYERS + 1)))
def test_surgery_goes_on_at_the_shard(shard, reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("deepseek_v3"), texts, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer, "write_shard", stop_at=shard)
        moe_compress.compress(RECIPES["deepseek_v3"], **options)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(RECIPES["deepseek_v3"], **options).folder
    assert not layers and len(written) == tiny.LAYERS + 1 - shard
    assert outcome(folder) == whole("deepseek_v3")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "name", "number"),
    slow_after(
        2,
        [
            (artefact.shutil, "rmtree", 0),
            (writer, "write_json", 1),
            (writer, "write_config", 0),
            (writer, "copy_companions", 0),
            (writer, "write_json", 2),
            (Path, "unlink", 0),
            (Path, "rename", 0),
        ],
    ),
)
def test_the_last_steps_go_on(place, name, number, reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("deepseek_v3"), texts, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, name, stop_at=number)
        moe_compress.compress(RECIPES["deepseek_v3"], **options)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(RECIPES["deepseek_v3"], **options).folder
    assert not layers and len(written) in (0, tiny.LAYERS + 1)
    assert outcome(folder) == whole("deepseek_v3")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", slow_unless(lambda call: call in (1, 4), range(2 * tiny.LAYERS)))
def test_two_stages_go_on_wherever_they_stopped(call, reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=call)
        moe_compress.compress(RECIPES["mixtral"], **options)
    with monkeypatch.context() as patch:
        calls = counting(patch, forward.hf, "run_layer")
        folder = moe_compress.compress(RECIPES["mixtral"], **options).folder
    assert len(calls) == 2 * tiny.LAYERS - call
    assert outcome(folder) == whole("mixtral")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("removed", slow_unless(lambda removed: removed in (0, 4, 9), range(10)))
def test_a_stop_while_a_stage_is_removed(removed, reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    first = tmp_path / "out.stage1"
    real = Path.unlink

    def unlink(path: Path, **keywords: bool) -> None:
        if path.parent == first and len(list(first.iterdir())) <= removed + 1:
            raise Interrupted
        real(path, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "unlink", unlink)
        moe_compress.compress(RECIPES["mixtral"], **options)
    assert first.exists()
    folder = moe_compress.compress(RECIPES["mixtral"], **options).folder
    assert outcome(folder) == whole("mixtral")
    assert leftovers(tmp_path) == []


def test_another_recipe_s_unfinished_work_is_replaced(reader_folder, texts, whole, monkeypatch, tmp_path):
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    for sentence in ("expert_drop keep=5", "expert_drop keep=7 + expert_drop keep=3"):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            counting(patch, writer, "write_shard", stop_at=6 if "+" in sentence else 2)
            moe_compress.compress(sentence, **options)
    assert (tmp_path / "out.partial").exists() and (tmp_path / "out.stage1").exists()
    folder = moe_compress.compress(RECIPES["mixtral"], **options).folder
    assert outcome(folder) == whole("mixtral")
    assert leftovers(tmp_path) == []


def test_another_recipe_clears_what_a_killed_one_left(reader_folder, texts, monkeypatch, tmp_path):
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    random = "expert_drop score=random"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer, "write_shard", stop_at=2 * (tiny.LAYERS + 1) + 1)
        moe_compress.compress(f"{random} keep=6 + {random} keep=5 + {random} keep=4", **options)
    (tmp_path / "out.stage9").mkdir()
    (tmp_path / "out.stage9" / "thesis.txt").write_text("mine")
    assert {path.name for path in tmp_path.glob("out.*")} == {"out.stage1", "out.stage2", "out.partial", "out.stage9"}
    moe_compress.compress(f"{random} keep=3", **options)
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out.stage9"}


def test_two_runs_do_not_write_into_one_folder(reader_folder, texts, tmp_path):
    """The lock is the system's: it holds while the other process lives, and not a moment longer."""
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    claim = "import sys; from pathlib import Path; from moe_compress.checkpoints.lock import exclusive_output as mine\n"
    claim += "with mine(Path(sys.argv[1]), []): print('mine', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", claim, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(ValueError, match=r"another run is writing .*out\.partial: wait until it has ended"):
            moe_compress.compress("expert_drop score=random", **options)
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / "out.partial").is_dir()
    assert moe_compress.compress("expert_drop score=random", **options).folder.is_dir()
    assert leftovers(tmp_path) == []


def test_an_applied_plan_goes_on(reader_folder, texts, monkeypatch, tmp_path):
    options = run_options(reader_folder("mixtral"), texts, tmp_path)
    made = moe_compress.compress("expert_drop keep=6", **options).folder
    again = {"out": str(tmp_path / "again"), "results": str(tmp_path), "eval": False}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer, "write_shard", stop_at=2)
        moe_compress.apply(made / "plan.json", **again)
    with monkeypatch.context() as patch:
        written = counting(patch, writer, "write_shard")
        folder = moe_compress.apply(made / "plan.json", **again).folder
    assert len(written) == tiny.LAYERS + 1 - 2
    assert [(folder / p.name).read_bytes() == p.read_bytes() for p in made.glob("*.safetensors")] == [True] * 4


def test_an_interrupted_evaluation_goes_on(reader_folder, options, monkeypatch, tmp_path):
    sentence, words = "expert_drop score=weight_norm", {**options, "model": reader_folder("mixtral")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=tiny.LAYERS + 1)
        moe_compress.compress(sentence, **words)
    with monkeypatch.context() as patch:
        calls, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        result = moe_compress.compress(sentence, **words)
    assert result.record is not None and not written
    assert len(calls) == tiny.LAYERS - 1  # the original was measured before, and one layer of the checkpoint
    assert leftovers(tmp_path) == []


@pytest.mark.slow  # the runs stopped above, by an exception, begin and end in the same places
def test_kill_9(reader_folder, texts, whole, tmp_path):
    """Killed by the system at chosen points, in the middle of writes and at random moments."""
    seed = random.SystemRandom().randrange(1000)
    moments = [random.Random(seed + n).randrange(20, 400) for n in range(1)]
    points = [("layer", 4), ("write", 60)]
    points += [("time", moment) for moment in moments]
    model = reader_folder("mixtral")
    options = [run_options(model, texts, tmp_path / str(n)) for n in range(len(points))]
    jobs = [(*point, RECIPES["mixtral"], given) for point, given in zip(points, options, strict=True)]
    done = subprocess.run(
        [sys.executable, str(Path(killed.__file__)), json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == len(jobs), done.stderr
    for n, (point, (ended_by, layers)) in enumerate(zip(points, lines, strict=True)):
        assert point[0] == "time" or ended_by == signal.SIGKILL, point
        assert point[0] != "layer" or layers == 2 * tiny.LAYERS - point[1]
        assert outcome(tmp_path / str(n) / "out") == whole("mixtral"), (point, seed)
        assert leftovers(tmp_path / str(n)) == [], (point, seed)


def test_threads_are_given_back(reader_folder, options):
    before = torch.get_num_threads()
    with pytest.raises(ValueError):
        moe_compress.compress("expert_drop keep=1", model=reader_folder("mixtral"), threads=2, **options)
    assert torch.get_num_threads() == before
