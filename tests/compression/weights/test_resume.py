"""Weight stages that are stopped, made smaller or run again give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compress
from moe_compress.checkpoints import companions, safetensors_file, writer
from moe_compress.checkpoints.folder import SCRATCH
from moe_compress.compression.weights import stage
from moe_compress.engine import forward
from support import tiny
from support.interrupted import Interrupted, counting, leftovers, outcome, outcomes, stopped_run
from support.pruned import report, stored
from support.slow import slow_after


@pytest.mark.parametrize(
    ("family", "words"),
    slow_after(
        1,
        [
            ("mixtral", "method=sparsegpt"),
            ("deepseek_v3", "where=experts,shared propagate=original shrink=8 min_tokens=20"),
            ("gpt_oss", "method=sparsegpt pattern=2:4 min_tokens=20"),
            ("granitemoe", "allocate=utilisation where=experts,router"),
        ],
    ),
)
def test_a_few_experts_at_a_time_or_all_at_once(family, words, made):
    folder, other = made(family, f"prune {words}"), made(family, f"prune {words} experts_at_once=3")
    one, parts = stored(folder), stored(other)
    for name in one:
        assert torch.equal(one[name] == 0, parts[name] == 0), name
        torch.testing.assert_close(one[name], parts[name], rtol=2e-3, atol=2e-4)
    first, second = report(folder), report(other)
    assert first.pop("routing_change").keys() == second.pop("routing_change").keys() and first == second


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v3"]))
def test_two_runs_write_the_same_bytes(family, lab, made, tmp_path):
    """The second is told in the YAML that the first one wrote, and measures everything anew."""
    sentence = "prune method=sparsegpt where=experts,router allocate=both"
    folder = made(family, sentence)
    again = {"out": tmp_path / "again", "results": tmp_path / "elsewhere"}
    found = moe_compress.compress(str(folder / "recipe.yaml"), **again).folder
    one, other = outcome(folder), outcome(found)
    assert [name for name in one if one[name] != other.get(name)] == [] and report(folder) == report(found)


STOPPED = {
    "compressed": "prune method=sparsegpt",
    "original": "prune propagate=original experts_at_once=3",
    "router": "prune where=experts,router",
    "allocated": "prune allocate=sensitivity",
    "nothing": "prune method=magnitude where=all",
}
# Runs of a layer per layer, before the first one counts, and what a layer of several runs begins with.
RUNS_PER_LAYER = {"compressed": 2, "original": 3, "router": 4, "allocated": 2, "nothing": 0}


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], dict[str, Any]]]:
    """name -> the outcome of its recipe and what is reported, never interrupted."""
    return outcomes(STOPPED, lab("mixtral"), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("name", "call"),
    slow_after(
        2,
        [
            *(("compressed", 3), ("original", 4), ("router", 6), ("allocated", 3)),
            *(
                ("compressed", 0),
                ("compressed", 4),
                ("original", 8),
                ("router", 11),
                ("allocated", 1),
                ("allocated", 6),
            ),
        ],
    ),
)
def test_a_stopped_run_goes_on_at_its_layer(name, call, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, _, folder = stopped_run(STOPPED[name], (forward.hf, "run_layer", call), options, monkeypatch)
    each, survey = RUNS_PER_LAYER[name], tiny.LAYERS if name == "allocated" else 0
    left = tiny.LAYERS - max(0, call - survey) // each
    assert layers == left * each + (survey if call < survey else 0)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "shard"), slow_after(2, [("compressed", 0), ("compressed", 3), ("nothing", 1), ("nothing", 2)])
)
def test_a_stopped_run_goes_on_at_its_shard(name, shard, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run(STOPPED[name], (writer, "write_shard", shard), options, monkeypatch)
    assert written == tiny.LAYERS + 1 - shard
    assert layers == RUNS_PER_LAYER[name] * (tiny.LAYERS - max(0, shard - 1))
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "number"),
    slow_after(1, [("compressed", 0), ("compressed", 2), ("allocated", 0), ("allocated", 2), ("nothing", 1)]),
)
def test_a_run_stopped_between_a_layer_and_its_notes_goes_on(name, number, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    point = (stage, "write_json", number)
    _, written, folder = stopped_run(STOPPED[name], point, options, monkeypatch)
    done = number - (name == "allocated")
    assert written == tiny.LAYERS + (done < 0) - max(0, done)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]


@pytest.mark.parametrize(
    ("place", "function", "number"),
    slow_after(1, [
        (writer, "copy_companions", 0),
        (writer, "write_json", 1),
        (writer, "write_json", 2),
        (writer, "write_config", 0),
        (Path, "unlink", 0),
        (Path, "rename", 0),
    ]),
)  # fmt: skip
def test_the_last_steps_do_not_begin_anew(place, function, number, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run(STOPPED["compressed"], (place, function, number), options, monkeypatch)
    assert outcome(folder) == whole("compressed")[0] and report(folder) == whole("compressed")[1]
    assert leftovers(tmp_path) == []
    assert (layers, written) == (0, 0)


def test_notes_that_were_left_behind_go_with_the_next_run(lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, companions.shutil, "rmtree", stop_at=0)
        moe_compress.compress(STOPPED["compressed"], **options)
    assert (tmp_path / "out" / SCRATCH).is_dir()
    folder = moe_compress.compress(STOPPED["compressed"], **options).folder
    assert outcome(folder) == whole("compressed")[0] and not (folder / SCRATCH).exists()


@pytest.mark.parametrize("writes", [40, 70])
def test_a_run_that_stops_between_two_tensors(writes, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, _, folder = stopped_run(
        STOPPED["compressed"], (safetensors_file, "write_all", writes), options, monkeypatch
    )
    assert layers < 2 * tiny.LAYERS
    assert outcome(folder) == whole("compressed")[0] and leftovers(tmp_path) == []


def test_another_recipe_s_notes_are_not_taken(lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=5)
        moe_compress.compress("prune method=sparsegpt sparsity=0.6", **options)
    folder = moe_compress.compress(STOPPED["compressed"], **options).folder
    assert outcome(folder) == whole("compressed")[0] and report(folder) == whole("compressed")[1]
