"""The speed harness: its statistics with an injected clock of known ratio, its worker's memory, and what it is told."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import moe_compress
from moe_compress.harness import speed as harness
from moe_compress.harness.timing import Effort, Paired, median_interval, paired
from moe_compress.harness.worker import Point, decode, kernels, load, memory, prefill, step_bytes, weight_tensors
from moe_compress.model.moe import moe_views
from moe_compress.report.speed import as_markdown
from moe_compress.speed_report import setting_of


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
    found = paired(lambda: clock.run("a", 3.0), lambda: clock.run("b", 2.0), Effort(pairs=40, seconds=0.0)).to_json()
    assert "".join(clock.turns) == "abba" * 20
    low, high = found["speedup_interval"]
    assert found["speedup"] == pytest.approx(1.5, rel=0.05) and low <= 1.5 * 1.02 and high >= 1.5 * 0.98
    assert found["pairs"] == 40 and (noise or drift or low == high == 1.5)


def test_it_goes_on_until_it_was_enough():
    for effort, pairs in ((Effort(3, 0.0), 3), (Effort(2, 30.0), 6), (Effort(10, 30.0), 10)):
        clock = Clock(0.0, 0.0)
        assert len(paired(lambda c=clock: c.run("a", 3.0), lambda c=clock: c.run("b", 2.0), effort).first) == pairs


def test_the_interval_covers_the_median_as_often_as_it_says():
    random, held = np.random.default_rng(1), 0
    for _ in range(200):
        low, high = median_interval((1.3 * np.exp(0.2 * random.standard_normal(25))).tolist())
        held += low <= 1.3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_spread_is_that_of_the_quartiles():
    assert Paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5).to_json()["spread"] == [pytest.approx(2 / 3), 0.0]


# --- a worker's model ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_memory_is_what_tensors_take(reader_folder):
    model = moe_compress.load(str(reader_folder("mixtral")), torch.float32)
    found = memory(model, Point(2, 8, 4))
    assert found["weights"] == sum(p.numel() * 4 for p in model.parameters())
    config = model.config
    assert found["cache"] == 2 * 2 * 8 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    assert found["step_bytes"] - found["cache"] == round(step_bytes(model, 2))
    assert prefill(model, Point(1, 8, 2)) > 0 and decode(model, Point(1, 8, 2)) > 0


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
    assert experts_of(model) < 0.35 * experts_of(dense)


def test_two_models_in_processes_of_their_own(reader_folder, options, monkeypatch):
    monkeypatch.setattr(harness, "used_by_others", lambda: 0.9)
    words = {**options, "eval": False, "model": str(reader_folder("mixtral"))}
    folder = moe_compress.compress("block_drop drop=1", **words).folder
    results = str(options["results"])
    found = moe_compress.speed(folder, prompts="8,16", batches="2", tokens=2, runs=2, seconds=0, results=results)
    assert [(point["batch"], point["prompt"]) for point in found.found["points"]] == [(2, 8), (2, 16)]
    for point in found.found["points"]:
        assert point["prefill"]["pairs"] == point["decode"]["pairs"] == 2
        assert point["memory"]["variant"]["weights"] < point["memory"]["original"]["weights"]
    text = as_markdown(found.to_json())
    for words in ("BUSY MACHINE: others used 90% of the processor", "attention sdpa", "not available"):
        assert words in text
    assert (folder.parents[1] / "speed" / f"{folder.name}.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"prompts": "a,b"}, "prompts=a,b: numbers separated by commas"),
        ({"prompts": "0"}, "counts from 1 up"),
        ({"batches": "-1"}, "counts from 1 up"),
        ({"prompts": "4000"}, "was made for 64. Use prompts= with shorter ones."),
        ({"seconds": "nan"}, "seconds= from 0 up"),
        ({"prompt": "8"}, "speed has no option 'prompt'; it takes: prompts, batches, tokens, .*, original, results"),
    ],
)
def test_bad_words(words, said, reader_folder, options):
    with pytest.raises(ValueError, match=said):
        moe_compress.speed(str(reader_folder("mixtral")), results=options["results"], **words)


def test_a_quick_setting_is_one_short_point():
    assert setting_of(quick="true").points() == [Point(1, 128, 16)]
    assert len(setting_of().points()) == 4 and setting_of().dtype == "float32"
