"""Paired timing with an injected clock of known ratio."""

from __future__ import annotations

import numpy as np
import pytest

from moe_compress.evaluation.speed.paired_timing import PairedTurns, TimingBudget, median_interval, paired, summary
from support.slow import slow_after


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


@pytest.mark.parametrize(("rho", "blocks"), slow_after(1, [(0.0, 8), (0.0, 30), (0.3, 30)]))
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


@pytest.mark.parametrize(("starts", "least"), slow_after(1, [(5, 0.88), (8, 0.88), (1, 0.0)]))
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
