"""The speed harness: its statistics with an injected clock of known ratio, its worker's memory, and what it is told."""

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
from moe_compress.evaluation.speed.memory import cache_tensors, step_bytes, weight_tensors
from moe_compress.evaluation.speed.paired_timing import PairedTurns, TimingBudget, median_interval, paired, summary
from moe_compress.evaluation.speed.report import as_markdown, setting_of
from moe_compress.evaluation.speed.worker import Workload, decode, kernels, load, memory, prefill
from moe_compress.models.moe import moe_views
from moe_compress.reports import companions


class Clock:
    """Two things of 3 and 2 seconds on a machine that gets slower with every turn, and shakes."""

    def __init__(self, drift: float, noise: float) -> None:
        self.turns: list[str] = []
        self.drift, self.noise = drift, noise
        self.random = np.random.default_rng(0)

    def run(self, name: str, seconds: float) -> float:
        self.turns.append(name)
        return seconds * (1 + self.drift * len(self.turns)) * float(np.exp(self.noise * self.random.standard_normal()))


@pytest.mark.parametrize(("drift", "noise"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.1), (0.02, 0.05)])
def test_the_ratio_of_a_known_clock_is_found(drift, noise):
    clock = Clock(drift, noise)
    found = summary([paired(lambda: clock.run("a", 3.0), lambda: clock.run("b", 2.0), TimingBudget(40, 0.0))], 4)
    assert "".join(clock.turns) == "ba" + "abba" * 20
    low, high = found["speedup_interval"]
    assert found["speedup"] == pytest.approx(1.5, rel=0.05) and low <= 1.5 * 1.02 and high >= 1.5 * 0.98
    assert found["runs"] == 40 and (noise or drift or (low, high) == pytest.approx((1.5, 1.5)))
    assert found["variant_seconds"] == pytest.approx(np.median(found["turns"]["variant"]) / 4)
    assert len(found["turns"]["original"][0]) == 40


def test_it_goes_on_until_it_was_enough_and_ends_with_a_whole_block():
    for effort, runs in ((TimingBudget(3, 0.0), 4), (TimingBudget(2, 30.0), 6), (TimingBudget(10, 30.0), 10)):
        clock = Clock(0.0, 0.0)
        assert len(paired(lambda c=clock: c.run("a", 3.0), lambda c=clock: c.run("b", 2.0), effort).first) == runs


def test_who_ran_before_does_not_matter():
    """Behind the other process, caches are cold: such turns take a tenth longer."""
    before: list[str] = []

    def run(name: str, seconds: float) -> float:
        cold = not before or before[-1] != name
        before.append(name)
        return seconds * (1.1 if cold else 1.0)

    found = summary([paired(lambda: run("a", 3.0), lambda: run("b", 2.0), TimingBudget(runs=11, seconds=0.0))])
    assert found["speedup"] == pytest.approx(1.5) and found["speedup_interval"] == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize(("rho", "blocks"), [(0.0, 8), (0.0, 30), (0.3, 30)])
def test_the_interval_covers_the_ratio_as_often_as_it_says(rho, blocks):
    """Of turns that shake, whose machine slows down, and whose blocks are like their neighbours."""
    random, held = np.random.default_rng(1), 0
    for _ in range(150):
        state, turns = 0.0, PairedTurns([], [])
        for number in range(blocks):
            state = rho * state + 0.1 * float(np.sqrt(1 - rho**2)) * float(random.standard_normal())
            for side, seconds in ((turns.first, 1.3 * np.exp(state)), (turns.second, 1.0)):
                side += (seconds * (1 + 0.01 * number) * np.exp(0.05 * random.standard_normal(2))).tolist()
        low, high = summary([turns])["speedup_interval"]
        held += low <= 1.3 <= high
    assert 0.88 <= held / 150 <= 0.995


@pytest.mark.parametrize(("starts", "least"), [(5, 0.88), (8, 0.88), (1, 0.0)])
def test_starts_that_differ_are_in_the_interval(starts, least):
    """Of a true ratio of 1.3 that every start of the processes moves by 6 %, and every turn by 2 %."""
    random, held = np.random.default_rng(2), 0
    for _ in range(150):
        found = []
        for moved in 0.06 * random.standard_normal(starts):
            turns = [0.02 * random.standard_normal(4) for _ in range(2)]
            found.append(PairedTurns((1.3 * np.exp(moved + turns[0])).tolist(), np.exp(turns[1]).tolist()))
        low, high = summary(found)["speedup_interval"]
        held += low <= 1.3 <= high
    assert held / 150 >= least and (starts > 1 or held / 150 < 0.5)


def test_the_interval_of_starts_is_that_of_drawing_them_one_by_one():
    starts = [[1.0, 1.1, 1.3], [0.9, 1.2, 1.25], [1.4, 1.5, 1.6], [1.1, 1.1, 1.2], [0.8, 1.0, 1.9]]
    random = np.random.default_rng(3)

    def draw() -> float:
        chosen = random.integers(5, size=5)
        return float(np.median([np.median(random.choice(starts[start], 3)) for start in chosen]))

    expected = np.percentile([draw() for _ in range(4000)], [2.5, 97.5])
    assert median_interval(starts) == pytest.approx(expected.tolist(), abs=0.03)


def test_an_outlying_start_moves_neither_the_median_nor_what_it_is_called():
    found = summary([PairedTurns([ratio] * 4, [1.0] * 4) for ratio in (1.16, 1.2, 1.42, 1.17, 1.19)])
    assert found["speedup"] == pytest.approx(1.19) and found["starts"] == 5 and found["runs"] == 20
    assert found["speedup_interval"] == pytest.approx([1.16, 1.42])
    assert TimingBudget(12, 1.0).share(5) == TimingBudget(3, 0.2)


def test_spread_is_that_of_the_quartiles():
    assert summary([PairedTurns([1.0, 2.0, 3.0, 4.0], [1.0] * 4)])["spread"] == [pytest.approx(0.6), 0.0]


# --- a worker's model ------------------------------------------------------------------------------------------------


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
    assert companions.read_json([kept], companions.timed, "speed")[1] == []
    kept.write_text(kept.read_text().replace('"batch": 2', '"batch": 1'))
    assert "changed after it was written" in companions.read_json([kept], companions.timed, "speed")[1][0]


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


@pytest.mark.parametrize("when", ["while it waits", "while it is asked"])
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
        assert started.process.wait(10) == 0 and not seen[-1].is_running()
    assert seen[0].pid != seen[1].pid


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
