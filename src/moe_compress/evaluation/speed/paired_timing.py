"""Two things timed beside each other: in turn, until there is enough of it, and what may be said of their ratio.

Turns go A B B A, block after block. In each block both run once behind the other and once behind themselves, so that a
block's ratio owes nothing to that order, nor to a machine that gets slower by and by. Processes that are started anew
differ by several times what blocks of the same processes do, so that starts are what an interval is drawn from. Nothing
here knows what is timed, nor reads a clock of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_compress.evaluation.statistics import LEVEL, RESAMPLES

STARTS = 5


@dataclass(frozen=True, slots=True)
class TimingBudget:
    """How long two things are timed: each runs so many times at least, and so many seconds pass in both at least."""

    runs: int = 20
    seconds: float = 10.0

    def share(self, starts: int) -> TimingBudget:
        """What is left for each of several starts."""
        return TimingBudget(math.ceil(self.runs / starts), self.seconds / starts)


@dataclass(frozen=True)
class PairedTurns:
    """Seconds of every turn of both in one start, in order; two turns of each are a block."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        """One for each block, of the geometric means of its turns. Above 1: the second is faster."""
        blocks = range(0, len(self.first), 2)
        sides = [[math.log(side[n]) + math.log(side[n + 1]) for n in blocks] for side in (self.first, self.second)]
        return [math.exp((a - b) / 2) for a, b in zip(*sides, strict=True)]


def summary(starts: Sequence[PairedTurns], per: int = 1) -> dict[str, Any]:
    """Medians, the median ratio of all starts with its interval, how even the turns were, and all turns by start.

    per: how many steps a turn has; seconds are those of one.
    """
    sides = [start.first for start in starts], [start.second for start in starts]
    first, second = ([seconds for turns in side for seconds in turns] for side in sides)
    ratios = [start.ratios for start in starts]
    low, high = median_interval(ratios)
    return {
        "original_seconds": statistics.median(first) / per,
        "variant_seconds": statistics.median(second) / per,
        "speedup": statistics.median(map(statistics.median, ratios)),
        "speedup_interval": [low, high],
        "starts": len(starts),
        "runs": len(first),
        "spread": [_spread(first), _spread(second)],
        "turns": {"original": sides[0], "variant": sides[1]},
    }


def paired(first: Callable[[], float], second: Callable[[], float], effort: TimingBudget) -> PairedTurns:
    """Time both in turn, by whole blocks; each call runs once and returns its seconds.

    Before the first block they run as if one had gone before.
    """
    found = PairedTurns([], [])
    second()
    first()
    while len(found.first) < effort.runs or sum(found.first) + sum(found.second) < effort.seconds:
        found.first.append(first())
        found.second.append(second())
        found.second.append(second())
        found.first.append(first())
    return found


def median_interval(starts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median of the starts' medians: starts are drawn anew, and blocks within them.

    Of five starts that differ by more than their blocks it is the lowest and the highest, which hold the true median in
    15 of 16 cases. Of one it says nothing of what another would give.
    """
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(starts), size=(RESAMPLES, len(starts)))
    medians = np.empty(chosen.shape)
    for number, ratios in enumerate(starts):
        slots = chosen == number
        draws = generator.choice(np.asarray(ratios), (int(slots.sum()), len(ratios)))
        medians[slots] = np.median(draws, axis=1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.median(medians, axis=1), [tail, 100 - tail])
    return float(low), float(high)


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
