"""Two things timed beside each other: in turn, until there is enough of it, and what may be said of their ratio.

Turns go A B B A A B B A ..., so that a machine that gets slower by and by is no one's gain; a pair of turns gives one
ratio. Nothing here knows what is timed, nor reads a clock of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Effort:
    """How long two things are timed: so many pairs at least, and so many seconds of both at least."""

    pairs: int = 10
    seconds: float = 10.0


@dataclass(frozen=True)
class Paired:
    """Seconds of both, pair by pair."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        """Above 1: the second is faster."""
        return [a / b for a, b in zip(self.first, self.second, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Medians, the median of the ratios with its interval, and how even the turns were."""
        low, high = median_interval(self.ratios)
        return {
            "original_seconds": statistics.median(self.first),
            "variant_seconds": statistics.median(self.second),
            "speedup": statistics.median(self.ratios),
            "speedup_interval": [low, high],
            "pairs": len(self.first),
            "spread": [_spread(self.first), _spread(self.second)],
        }


def paired(first: Callable[[], float], second: Callable[[], float], effort: Effort) -> Paired:
    """Time both in turn; each call runs once and returns its seconds."""
    found = Paired([], [])
    while len(found.first) < effort.pairs or sum(found.first) + sum(found.second) < effort.seconds:
        if len(found.first) % 2 == 0:
            found.first.append(first())
            found.second.append(second())
        else:
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


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
