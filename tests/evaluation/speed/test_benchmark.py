"""The speed harness: its worker's memory, its processes, and what it is told."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import moe_compress
from moe_compress.evaluation.speed import benchmark as harness
from moe_compress.evaluation.speed import gpu_energy, worker
from moe_compress.evaluation.speed.columns import timed
from moe_compress.evaluation.speed.memory import cache_tensors, step_bytes, weight_tensors
from moe_compress.evaluation.speed.report import as_markdown, setting_of
from moe_compress.evaluation.speed.worker import Workload, decode, kernels, load, memory, prefill
from moe_compress.models.moe import moe_views
from moe_compress.reports import companions
from support.slow import slow_after


@torch.inference_mode()
def test_memory_is_what_tensors_take(reader_folder):
    model = moe_compress.load(str(reader_folder("mixtral")), torch.float32)
    found = memory(model, Workload(2, 8, 4))
    assert found["weights"] == sum(p.numel() * 4 for p in model.parameters())
    config = model.config
    assert found["cache"] == 2 * 2 * 8 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    assert found["step_bytes"] - found["cache"] == round(step_bytes(model, 2))
    assert prefill(model, Workload(1, 8, 2)) > 0 and decode(model, Workload(1, 8, 2)) > 0


def test_a_step_reads_the_experts_that_it_is_expected_to_use(reader_folder):
    model = moe_compress.load(str(reader_folder("mixtral")), torch.float32)
    experts = sum(p.numel() * 4 for name, p in model.named_parameters() if ".experts." in name)
    table = model.get_input_embeddings().weight
    others = sum(t.nbytes for t in weight_tensors(model)) - experts - table.nbytes
    for batch in (1, 3):
        # 2 of 8 experts, chosen anew by every sequence: by brute force over what one of them leaves out.
        left = np.mean([0 not in pair for pair in itertools.combinations(range(8), 2)]) ** batch
        expected = others + experts * (1 - left) + batch * table.shape[1] * 4
        assert step_bytes(model, batch) == pytest.approx(expected)


def experts_of(model: Any) -> float:
    """Bytes of all experts, from what a step of one sequence reads of them."""
    whole, table = step_bytes(model, 1), model.get_input_embeddings().weight
    inside = {id(t) for view in moe_views(model).values() for t in weight_tensors(view.experts)}
    others = sum(t.nbytes for t in weight_tensors(model) if id(t) not in inside) - table.nbytes + table[0].nbytes
    return whole - others


def test_packed_experts_are_counted_in_their_kernel(reader_folder, options):
    words = {**options, "eval": False, "model": str(reader_folder("mixtral"))}
    folder = moe_compress.compress(
        "quantize method=rtn bits=8 group_size=0 format=packed + activations", **words
    ).folder
    model = load(folder, torch.float32, torch.device("cpu"))
    assert kernels(model)["packed"] == {"8 bits in Int8Rows": 3 * 8 * 3}
    dense = moe_compress.load(str(reader_folder("mixtral")), torch.float32)
    assert 0.25 * experts_of(dense) <= experts_of(model) < 0.35 * experts_of(dense)
    assert prefill(model, Workload(1, 8, 2)) > 0 and decode(model, Workload(1, 8, 2)) > 0


def test_two_models_in_processes_of_their_own(reader_folder, options, monkeypatch):
    monkeypatch.setattr(harness, "used_by_others", lambda: 0.9)
    words = {**options, "eval": False, "model": str(reader_folder("mixtral"))}
    folder = moe_compress.compress("block_drop drop=1", **words).folder
    results = str(options["results"])
    found = moe_compress.speed(
        folder, prompts="8,16", batches="2", tokens=2, runs=3, seconds=0, starts=2, threads=1, results=results
    )
    assert [(point["batch"], point["prompt"]) for point in found.found["points"]] == [(2, 8), (2, 16)]
    for point in found.found["points"]:
        assert point["prefill"]["runs"] == point["decode"]["runs"] == 4 and point["decode"]["starts"] == 2
        assert point["decode"]["joules"] == {"original": None, "variant": None}
        seconds = point["decode"]["turns"]["variant"]
        assert point["decode"]["variant_seconds"] == pytest.approx(np.median(seconds) / 2)
        assert point["decode"]["variant_tokens_per_second"] == pytest.approx(2 * 2 / np.median(seconds))
        rate = point["prefill"]["original_tokens_per_second"]
        assert rate == pytest.approx(2 * point["prompt"] / np.median(point["prefill"]["turns"]["original"]))
        assert point["memory"]["original"]["activations"] >= 0
        assert point["memory"]["variant"]["weights"] < point["memory"]["original"]["weights"]
    text = as_markdown(found.to_json())
    for words in (
        "BUSY MACHINE: others used 90% before",
        "attention sdpa",
        "not available",
        "1 thread(s)",
        "] *",
        "variant",
    ):
        assert words in text
    (kept,) = (folder.parents[1] / "speed").glob(f"{folder.name}-*.json")
    assert companions.read_json([kept], timed, "speed")[1] == []
    kept.write_text(kept.read_text().replace('"batch": 2', '"batch": 1'))
    assert "changed after it was written" in companions.read_json([kept], timed, "speed")[1][0]


def test_a_step_of_memory_is_seen(monkeypatch, reader_folder):
    """Peak above what was held: known numbers in, known numbers out."""
    model = moe_compress.load(str(reader_folder("mixtral")), torch.float32)
    peaks = iter([1000, 9_000_000])
    monkeypatch.setattr(worker, "peak_memory_bytes", lambda _: next(peaks))
    with torch.inference_mode():
        found = memory(model, Workload(1, 4, 2))
    assert found["activations"] == 9_000_000 - 1000 - found["cache"]


def test_the_first_turn_is_warmed_up(monkeypatch):
    ran: list[str] = []
    monkeypatch.setitem(worker.RUNS, "prefill", lambda model, point: float(len(ran.append("run") or ran)))
    warm: set[Any] = set()
    assert worker.answer(None, "prefill", Workload(1, 2, 3), warm) == worker.WARM_UP + 1
    assert worker.answer(None, "prefill", Workload(1, 2, 3), warm) == worker.WARM_UP + 2


def test_energy_is_counted_around_each_models_own_turns(monkeypatch):
    counter = {"now": 0.0}

    class Driver:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: f"handle of {uuid}")
        nvmlDeviceGetTotalEnergyConsumption = staticmethod(lambda handle: counter["now"])
        nvmlDeviceGetClockInfo = staticmethod(lambda handle, kind: 1980)

    def run(millijoules: float) -> float:
        counter["now"] += millijoules
        return 1.0

    monkeypatch.setitem(sys.modules, "pynvml", Driver)
    first, second = gpu_energy.Meter("GPU-1"), gpu_energy.Meter("GPU-1")
    for _ in range(2):
        assert first.around(lambda: run(3000))() == 1.0 and second.around(lambda: run(500))() == 1.0
    assert (first.taken(2), second.taken(2), first.megahertz()) == (3.0, 0.5, 1980)
    assert first.taken(2) == 0.0 and gpu_energy.Meter(None).taken(2) is None


def test_what_others_use_is_seen(monkeypatch):
    moments = iter([(100.0, 900.0), (180.0, 920.0)])

    class Times(tuple):
        idle = property(lambda self: self[1])

    monkeypatch.setattr(harness.psutil, "cpu_times", lambda: Times(next(moments)))
    spent = iter([(10.0, 0.0), (40.0, 10.0)])
    process = type("P", (), {"cpu_times": lambda self: next(spent)})
    monkeypatch.setattr(harness.psutil, "Process", lambda pid: process())
    # 100 s of all processors passed, 80 busy, 40 of them ours.
    assert harness.OtherLoad([1]).share() == pytest.approx(0.4)


def test_models_that_do_not_fit_are_refused_with_what_they_need(reader_folder, options, monkeypatch):
    monkeypatch.setattr("moe_compress.checkpoints.load.free_memory", lambda _: 10_000)
    with pytest.raises(ValueError, match=r"to be timed in turn: .* in memory, but cpu has .* free"):
        moe_compress.speed(str(reader_folder("mixtral")), prompts="8", tokens=2, results=options["results"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"prompts": "a,b"}, "prompts=a,b: numbers separated by commas"),
        ({"prompts": "0"}, "counts from 1 up"),
        ({"batches": "-1"}, "counts from 1 up"),
        ({"prompts": "4000"}, "was made for 64. Use prompts= with shorter ones."),
        ({"seconds": "nan"}, "seconds= from 0 up"),
        ({"seconds": "inf"}, "seconds= from 0 up"),
        ({"seconds": "-5"}, "seconds= from 0 up"),
        ({"tokens": "0"}, "counts from 1 up"),
        ({"runs": "0"}, "counts from 1 up"),
        ({"threads": "0"}, "counts from 1 up"),
        ({"starts": "0"}, "counts from 1 up"),
        ({"prompt": "8"}, "speed has no option 'prompt'; it takes: prompts, batches, tokens, .*, original, results"),
    ],
)
def test_bad_words(words, said, reader_folder, options):
    with pytest.raises(ValueError, match=said):
        moe_compress.speed(str(reader_folder("mixtral")), results=options["results"], **words)


@pytest.mark.parametrize("when", slow_after(1, ["while it is asked", "while it waits"]))
def test_a_worker_that_is_killed_is_one_sentence(when, reader_folder, monkeypatch):
    killed = worker.Worker(reader_folder("mixtral"), worker.RunSetup("float32", "cpu", 1))
    with pytest.raises(ValueError, match="ended early"), killed:
        killed.start()
        child = psutil.Process(killed.loaded()["process"])
        assert child.ppid() == killed.process.pid
        child.kill()
        if when == "while it waits":
            killed.process.wait()
        for _ in range(3):
            killed.ask("prefill", Workload(1, 8, 2))
    assert killed.process.poll() is not None


@pytest.mark.slow  # the two models above are timed in two starts each
@pytest.mark.parametrize("copied", [True, False])
def test_every_start_is_another_process(copied, reader_folder):
    seen = []
    with worker.Worker(reader_folder("mixtral"), worker.RunSetup("float32", "cpu", 1, copied)) as started:
        started.start()
        seen.append(psutil.Process(started.loaded()["process"]))
        assert started.ask("prefill", Workload(1, 8, 2)) > 0
        started.end()
        assert not seen[-1].is_running()
        started.start()
        seen.append(psutil.Process(started.loaded()["process"]))
        started.connection.close()  # nobody is left to ask
        assert started.process.wait(60) == 0 and not seen[-1].is_running()
    assert seen[0].pid != seen[1].pid


@pytest.mark.slow  # the two models above are timed by workers of a program without a guard, too: pytest's
def test_a_script_without_a_guard_may_time_packed_weights_in_their_kernel(options, tmp_path):
    words = {**options, "eval": False, "model": "tiny-mixtral"}
    folder = moe_compress.compress("quantize method=rtn bits=4 group_size=32", **words).folder
    told = {"prompts": "8", "batches": "1", "tokens": 2, "runs": 1, "seconds": 0, "starts": 1, "dtype": "bfloat16"}
    told |= {"threads": 1, "results": str(tmp_path)}
    script = tmp_path / "mine.py"
    script.write_text(f"import moe_compress\nprint('once')\nmoe_compress.speed({str(folder)!r}, **{told!r})\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr
    (path,) = tmp_path.glob("speed/*.json")
    found = json.loads(path.read_text())["found"]
    (point,), (name,) = found["points"], found["variant"]["packed"]
    assert name == "4 bits in Int4" and point["prefill"]["variant_seconds"] > 0
    assert 0.2 < point["memory"]["variant"]["weights"] / point["memory"]["original"]["weights"] < 0.7


def test_states_of_recurrent_layers_are_part_of_the_cache():
    layer = type("Layer", (), {})()
    layer.keys, layer.states = torch.zeros(2), {"conv": [torch.zeros(3)], "recurrent": torch.zeros(4), "none": None}
    assert sum(t.numel() for t in cache_tensors(type("Cache", (), {"layers": [layer]})())) == 9


def test_every_expert_of_llama4_is_read(family_folder):
    model = moe_compress.load(str(family_folder("llama4_text")), torch.float32)
    assert step_bytes(model, 1) == pytest.approx(
        sum(t.nbytes for t in weight_tensors(model)) - model.get_input_embeddings().weight[1:].nbytes
    )


def test_a_quick_setting_is_one_short_point():
    assert setting_of(quick="true").points() == [Workload(1, 128, 16)]
    assert len(setting_of().points()) == 4 and setting_of().dtype == "float32"
