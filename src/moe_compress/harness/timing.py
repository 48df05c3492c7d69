"""Two things timed beside each other: in turn, until there is enough of it, and what may be said of their ratio.

Turns go A B B A, block after block. In each block both run once behind the other and once behind themselves, so that a
block's ratio owes nothing to that order, nor to a machine that gets slower by and by. Nothing here knows what is timed,
nor reads a clock of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
BEYOND_CHANCE = 1.96


@dataclass(frozen=True, slots=True)
class Effort:
    """How long two things are timed: each runs so many times at least, and so many seconds pass in both at least."""

    runs: int = 20
    seconds: float = 10.0


@dataclass(frozen=True)
class Paired:
    """Seconds of every turn of both, in order; two turns of each are a block."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        """One for each block, of the geometric means of its turns. Above 1: the second is faster."""
        blocks = range(0, len(self.first), 2)
        sides = [[math.log(side[n]) + math.log(side[n + 1]) for n in blocks] for side in (self.first, self.second)]
        return [math.exp((a - b) / 2) for a, b in zip(*sides, strict=True)]

    def to_json(self, per: int = 1) -> dict[str, Any]:
        """Medians, the median of the ratios with its interval, how even the turns were, and all turns.

        per: how many steps a turn has; seconds are those of one.
        """
        low, high = median_interval(self.ratios)
        return {
            "original_seconds": statistics.median(self.first) / per,
            "variant_seconds": statistics.median(self.second) / per,
            "speedup": statistics.median(self.ratios),
            "speedup_interval": [low, high],
            "blocks_alike": alike(self.ratios),
            "runs": len(self.first),
            "spread": [_spread(self.first), _spread(self.second)],
            "turns": {"original": self.first, "variant": self.second},
        }


def paired(first: Callable[[], float], second: Callable[[], float], effort: Effort) -> Paired:
    """Time both in turn, by whole blocks; each call runs once and returns its seconds.

    Before the first block they run as if one had gone before.
    """
    found = Paired([], [])
    second()
    first()
    while len(found.first) < effort.runs or sum(found.first) + sum(found.second) < effort.seconds:
        found.first.append(first())
        found.second.append(second())
        found.second.append(second())
        found.first.append(first())
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median."""
    generator = np.random.default_rng(0)
    draws = generator.choice(np.asarray(values), (RESAMPLES, len(values)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.median(draws, axis=1), [tail, 100 - tail])
    return float(low), float(high)


def alike(values: Sequence[float]) -> bool:
    """Whether neighbours resemble each other beyond chance, so that an interval of independent draws is too narrow."""
    centred = np.asarray(values) - np.mean(values)
    power = float(centred @ centred)
    return bool(power) and float(centred[1:] @ centred[:-1]) / power > BEYOND_CHANCE / math.sqrt(len(values))


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
