"""Intervals cover what they are of; paired ones are narrower."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_compress.evaluation import statistics
from moe_compress.evaluation.quality.perplexity import Measurement
from support.slow import slow_after


def measurement(nll: list[float], tokens: list[float]) -> Measurement:
    zeros = torch.zeros(len(nll), dtype=torch.long)
    return Measurement(torch.tensor(nll).double(), torch.tensor(tokens).double(), zeros, ("text",))


def test_paired_interval_is_narrower_than_the_unpaired_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 120).astype(float)
    difficulty = rng.normal(3, 0.8, 120)
    base = measurement((difficulty * tokens).tolist(), tokens.tolist())
    worse = measurement(((difficulty + rng.normal(0.05, 0.02, 120)) * tokens).tolist(), tokens.tolist())
    found = statistics.metrics(worse, base)
    low, high = found["delta_nll"]["interval"]
    assert low < 0.05 < high and high - low < 0.02
    perplexity_low, perplexity_high = found["perplexity"]["interval"]
    assert math.log(perplexity_high / perplexity_low) > 5 * (high - low)


def test_one_document_has_no_interval():
    assert statistics.metrics(measurement([30.0], [10.0]), None)["perplexity"]["interval"] is None


@pytest.mark.parametrize("documents", slow_after(1, [20, 60]))
def test_intervals_cover_what_they_are_of(documents):
    """Many texts drawn from one source whose numbers are known: losses, changes, KL and agreement by document."""
    rng = np.random.default_rng(4)
    truth = {"delta_nll": 0.02, "kl": 0.1, "top1_agreement": 0.8, "nll": 2.02}
    held = dict.fromkeys(truth, 0)
    for _ in range(120):
        tokens = rng.integers(80, 121, documents).astype(float)
        level = rng.normal(2.0, 0.5, documents)
        sums = {
            "before": level * tokens,
            "nll": (level + rng.normal(0.02, 0.03, documents)) * tokens,
            "kl": rng.gamma(4, 0.1 / 4, documents) * tokens,
            "agree": rng.binomial(tokens.astype(int), 0.8).astype(float),
        }
        made = {name: torch.from_numpy(values) for name, values in sums.items()}
        domain = torch.zeros(documents, dtype=torch.long)
        counts = torch.from_numpy(tokens)
        first = Measurement(made["before"], counts, domain, ("all",), None, None)
        second = Measurement(made["nll"], counts, domain, ("all",), made["kl"], made["agree"])
        found = statistics.metrics(second, first)
        for name, value in truth.items():
            low, high = found[name]["interval"]
            held[name] += low <= value <= high
    assert all(0.87 <= count / 120 <= 0.995 for count in held.values()), held


def test_domains_have_changes_of_their_own_and_answers_flip():
    sums = {"tokens": torch.tensor([10.0, 10, 20, 20]), "domain": torch.tensor([0, 0, 1, 1])}
    right = torch.tensor([True, True, False, False, True])
    first = Measurement(torch.tensor([1.0, 2, 3, 4]), **sums, domains=("a", "b"), kl=None, agree=None, correct=right)
    right = torch.tensor([True, False, True, False, False])
    second = Measurement(torch.tensor([2.0, 3, 5, 6]), **sums, domains=("a", "b"), kl=None, agree=None, correct=right)
    found = statistics.metrics(second, first)
    assert found["delta_nll_a"]["value"] == pytest.approx(2 / 20) and found["delta_nll_b"]["value"] == pytest.approx(
        0.1
    )
    assert found["delta_nll"]["value"] == pytest.approx(6 / 60)
    assert found["task_flips"]["value"] == 0.6 and found["delta_task_accuracy"]["value"] == pytest.approx(-0.2)
