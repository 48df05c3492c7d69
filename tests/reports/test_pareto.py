"""Fronts with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_compress.reports import pareto
from support.records import DOCUMENTS, ORIGINAL, TOKENS, measured, record, sized


def dominated(cost: np.ndarray, value: np.ndarray) -> list[bool]:
    pairs = list(zip(cost.tolist(), value.tolist(), strict=True))
    return [any(a <= c and b <= v and (a, b) != (c, v) for a, b in pairs) for c, v in pairs]


def test_membership_is_what_the_definition_says():
    rng = np.random.default_rng(0)
    # Few distinct numbers, so that there are ties in one, and in both.
    costs, values = rng.integers(0, 5, (2, 300, 8)).astype(float)
    found = pareto.on_front(costs, values)
    for at in range(300):
        assert found[at].tolist() == [not each for each in dominated(costs[at], values[at])]
    assert np.array_equal(pareto.on_front(costs[0], values)[7], pareto.on_front(costs[0], values[7]))


def test_shares_are_known_for_known_cases(tmp_path):
    """One document set for all: worse everywhere is never on the front, cheaper is always, equals share it."""
    rng = np.random.default_rng(1)
    text = rng.normal(200, 60, DOCUMENTS)  # much larger than what tells the models apart
    noise = rng.normal(0, 1, DOCUMENTS // 2)
    noise = np.concatenate([noise, -noise])
    cases = {
        "original": (4, text),
        "worse": (4, text + 1),  # dominated in every draw
        "cheap": (1, text + 50),  # nothing is as cheap
        "one": (3, text + 0.5 + noise),  # these two are equal in the mean, and cost the same
        "two": (3, text + 0.5 - noise),
    }
    rows = []
    for name, (mib, nll) in cases.items():
        stages = [] if name == "original" else [("prune", {"a": name})]
        rows.append([measured(tmp_path, record(name, 2.0, stages, **sized(mib)), nll)])
    front = pareto.make_fronts(list(cases), rows, [tmp_path])[0]
    assert front.key == "bytes" and not any("no sums" in note for note in front.notes)
    found = {point.name: point for point in front.points}
    assert found["worse"].share == 0.0 and not found["worse"].front
    assert found["cheap"].share == 1.0 and found["original"].share > 0.9
    assert found["one"].share == pytest.approx(0.5, abs=0.02) and found["one"].share + found["two"].share >= 1.0
    # Paired: only what tells a model from the original is in its interval.
    low, high = found["worse"].interval
    ratio = math.exp(1 / TOKENS) * found["original"].perplexity
    assert low == pytest.approx(ratio, rel=1e-9) and high == pytest.approx(ratio, rel=1e-9)
    assert found["original"].interval == pytest.approx((found["original"].perplexity,) * 2)


def test_identical_models_do_not_dominate_each_other(tmp_path):
    nll = np.linspace(100, 300, DOCUMENTS)
    rows = [[measured(tmp_path, record(name, 2.0, [("prune", {"a": name})]), nll)] for name in ("a", "b")]
    assert [point.share for point in pareto.make_fronts(["a", "b"], rows, [tmp_path])[0].points] == [1.0, 1.0]


def test_the_interval_of_drawn_perplexities_covers(tmp_path):
    """Of many texts drawn from one source, about 95 % have the source's perplexity in their interval."""
    rng, inside = np.random.default_rng(2), 0
    for number in range(200):
        row = [measured(tmp_path, record(f"text{number}", 2.0), rng.normal(200, 30, DOCUMENTS))]
        values_B = pareto.draw([row], [tmp_path], draws=1000).values_BR[:, 0]
        low, high = pareto.tails(values_B)
        inside += low <= math.exp(2.0) <= high
    assert 0.89 <= inside / 200 <= 0.99


@pytest.mark.parametrize("what", ["missing", "torn", "of another run", "of another text"])
def test_without_sums_per_document_the_interval_is_drawn_from(what, tmp_path):
    first = measured(tmp_path, ORIGINAL, np.full(DOCUMENTS, 200.0))
    other = record("worse", 2.1, [("prune", {})], **sized(3))
    path = tmp_path / "worse.safetensors"
    if what == "torn":
        path.write_bytes(b"no tensors")
    if what == "of another run":
        measured(tmp_path, other, np.full(DOCUMENTS, 250.0))
    if what == "of another text":
        other = measured(tmp_path, other, np.full(30, 210.0), np.full(30, TOKENS))
    front = pareto.make_fronts(["original", "worse"], [[first], [other]], [tmp_path / "none", tmp_path])[0]
    assert any(note.startswith("1 of these rows have no sums per document") for note in front.notes)
    (point,) = [point for point in front.points if point.name == "worse"]
    low, high = other.metrics["perplexity"].interval
    assert point.interval == pytest.approx((low, high), rel=0.01)


def test_several_seeds_are_one_point_and_are_drawn_too(tmp_path):
    seeds = [measured(tmp_path, record(f"s{n}", 2.0), np.full(DOCUMENTS, 200.0 + n)) for n in range(2)]
    drawn = pareto.draw([seeds], [tmp_path])
    one, other = math.exp(2.0), math.exp(2.01)
    assert drawn.perplexity_R == pytest.approx([(one + other) / 2])
    found, counts = np.unique(drawn.values_BR.round(9), return_counts=True)
    assert found == pytest.approx([one, (one + other) / 2, other], abs=1e-8)
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
