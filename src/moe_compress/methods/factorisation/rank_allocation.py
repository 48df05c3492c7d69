"""Which rank each matrix gets out of one budget: the largest sum of what ranks are worth, found by whole numbers.

A choice for every matrix (a multiple-choice knapsack) of concave worth: singular values only fall.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.methods.factorisation.base_delta import shared_mean
from moe_compress.methods.factorisation.low_rank import spectrum
from moe_compress.methods.factorisation.structures import Grams
from moe_compress.methods.factorisation.whitening import Metrics, full_precision

Key = TypeVar("Key", bound=Hashable)
Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]

# Sums of costs that are told apart to either side, in units of the costs' greatest common divisor.
SUMS = 1 << 13
# Matrices about which more than one rank is in question.
OPEN = 1 << 11


@torch.no_grad()
def spectra_of(structure: str, weight_EOI: Tensor, grams: Grams | None) -> list[Tensor]:
    """What each further rank of each expert is worth, descending: squared singular values, as its inputs see them.

    Of the experts (svd, sparse_low_rank), or of what they have besides their best common core (base_delta).
    """
    with full_precision():
        metrics = Metrics(grams, weight_EOI)
        core_OI = shared_mean(weight_EOI, metrics) if structure == "base_delta" else torch.zeros_like(weight_EOI[0])
        return [
            spectrum((weight_OI.double() - core_OI).to(metrics.dtype), metrics[e])
            for e, weight_OI in enumerate(weight_EOI)
        ]


@dataclass(frozen=True, slots=True)
class _Ladder:
    """The ranks that one matrix may have, ascending, with what each costs and is worth."""

    rank_N: Counts
    cost_N: Counts
    worth_N: Numbers


def allocate(
    spectra: Mapping[Key, Tensor],
    cost: Mapping[Key, int],
    weight: Mapping[Key, float],
    budget: int,
    floor: int,
    multiple: int,
) -> dict[Key, int]:
    """A rank for every key: the most weight * (sum of the squared singular values kept) at no more than the budget.

    spectra: squared whitened singular values, descending, as many as a rank may be; cost: parameters of one rank;
    floor: the least rank; multiple: from there on ranks are multiples of it (below, any rank will do).

    Exact with costs alike and multiple=1: there it takes the largest values. In general, by the values' price: the
    Lagrangian bound leaves few ranks in question (those whose loss of price is within the gap between the bound and the
    greedy choice), and dynamic programming over their sums of costs finds the best of them. That is the optimum if no
    more than OPEN matrices are in question and their costs add up to no more than SUMS units (greatest common divisors)
    to either side; else it is the best of the choices that stay within those, never below the greedy one, which is
    within the worth of one step of the optimum. Raises ValueError if the floors alone exceed the budget.
    """
    ladders = {key: _ladder(spectra[key], cost[key], weight[key], floor, multiple) for key in spectra}
    least = sum(int(ladder.cost_N[0]) for ladder in ladders.values())
    if least > budget:
        raise ValueError(
            f"ranks of at least {floor} take {least} parameters of {len(ladders)} matrices: {budget} is less."
        )
    chosen = _best(list(ladders.values()), budget)
    return {key: int(ladder.rank_N[n]) for (key, ladder), n in zip(ladders.items(), chosen, strict=True)}


def allowed_ranks(most: int, floor: int, multiple: int) -> list[int]:
    """From the floor up to `most`: any rank below `multiple`, multiples of it from there on; at least one."""
    ranks = [rank for rank in range(min(floor, most), most + 1) if rank < multiple or rank % multiple == 0]
    return ranks or [most - most % multiple or most]


def _ladder(spectrum: Tensor, cost: int, weight: float, floor: int, multiple: int) -> _Ladder:
    value = spectrum.detach().double().cpu().numpy()
    rank_N = np.array(allowed_ranks(len(value), floor, multiple), dtype=np.int64)
    worth = np.concatenate([[0.0], np.cumsum(np.maximum(value, 0.0))]) * weight
    return _Ladder(rank_N, rank_N * cost, worth[rank_N])


def _best(ladders: list[_Ladder], budget: int) -> list[int]:
    """The place on each ladder."""
    chosen, price = _greedy(ladders, budget)
    unit = math.gcd(*(int(step) for ladder in ladders for step in np.unique(np.diff(ladder.cost_N)))) or 1
    spent = sum(int(ladder.cost_N[n]) for ladder, n in zip(ladders, chosen, strict=True))
    # No choice can spend what is less than a unit.
    budget -= (budget - spent) % unit
    peaks = [int((ladder.worth_N - price * ladder.cost_N).argmax()) for ladder in ladders]
    lost = [
        (ladder.worth_N[top] - price * ladder.cost_N[top]) - (ladder.worth_N - price * ladder.cost_N)
        for ladder, top in zip(ladders, peaks, strict=True)
    ]
    slack = budget - sum(int(ladder.cost_N[top]) for ladder, top in zip(ladders, peaks, strict=True))
    gap = sum(float(loss[n]) for loss, n in zip(lost, chosen, strict=True)) + price * (budget - spent)
    largest = sum(float(abs(ladder.worth_N[-1])) for ladder in ladders)
    if gap <= 1e-13 * largest:
        return chosen
    found = _search(ladders, peaks, lost, slack // unit, unit, price * unit, gap * (1 + 1e-9))
    return chosen if found is None else found


def _greedy(ladders: list[_Ladder], budget: int) -> tuple[list[int], float]:
    """(places, the price at which the budget is met): steps by worth for their cost, as long as they fit.

    A ladder stops at its first step that does not fit; steps of others may still follow.
    """
    taken = np.concatenate([np.diff(ladder.cost_N) for ladder in ladders])
    worth = [np.diff(ladder.worth_N) / np.diff(ladder.cost_N) for ladder in ladders]
    # No step before the one below it, whatever rounding says.
    density = np.concatenate([np.minimum.accumulate(own) for own in worth])
    owner = np.repeat(np.arange(len(ladders)), [len(own) for own in worth])
    left = budget - sum(int(ladder.cost_N[0]) for ladder in ladders)
    order = np.argsort(-density, kind="stable")
    fitting = int(np.searchsorted(np.cumsum(taken[order]), left, side="right"))
    left -= int(taken[order[:fitting]].sum())
    place: list[int] = np.bincount(owner[order[:fitting]], minlength=len(ladders)).tolist()
    if fitting == len(order):
        return place, 0.0
    stopped: set[int] = set()
    smallest = int(taken[order[fitting:]].min())
    for step in order[fitting:]:
        k = int(owner[step])
        if left < smallest:
            break
        if k in stopped:
            continue
        if taken[step] <= left:
            place[k], left = place[k] + 1, left - int(taken[step])
        else:
            stopped.add(k)
    return place, float(density[order[fitting]])


def _search(
    ladders: list[_Ladder],
    peaks: list[int],
    lost: list[Numbers],
    slack: int,
    unit: int,
    unit_price: float,
    gap: float,
) -> list[int] | None:
    """Places whose loss of price, that of unspent units included, is least, if less than the gap; else None.

    slack: units left (or lacking, below 0) where every ladder stands at its peak.
    """
    moves = [_moves(ladder, peak, loss, unit, gap) for ladder, peak, loss in zip(ladders, peaks, lost, strict=True)]
    order = sorted((k for k, own in enumerate(moves) if len(own) > 1), key=lambda k: moves[k][1][2])[:OPEN]
    below = min(SUMS, sum(-min(units for _, units, _ in moves[k]) for k in order))
    above = min(SUMS, sum(max(units for _, units, _ in moves[k]) for k in order))
    least = np.full(below + above + 1, np.inf)
    least[below] = 0.0
    picks = np.zeros((len(order), len(least)), dtype=np.int16)
    for row, k in enumerate(order):
        least = _widened(least, moves[k], gap, picks[row])
    spent = np.arange(-below, above + 1)
    total = np.where(spent <= slack, least + unit_price * (slack - spent), np.inf)
    if not len(total) or total.min() >= gap:
        return None
    places, at = list(peaks), int(total.argmin())
    for row in reversed(range(len(order))):
        place, units, _ = moves[order[row]][picks[row, at]]
        places[order[row]] = place
        at -= units
    return places


def _moves(ladder: _Ladder, peak: int, loss: Numbers, unit: int, gap: float) -> list[tuple[int, int, float]]:
    """(place, units it costs more than the peak, its loss) of all that lose no more than the gap, by loss."""
    places = sorted(np.flatnonzero(loss <= gap).tolist(), key=lambda n: (float(loss[n]), abs(n - peak)))
    return [(n, int(ladder.cost_N[n] - ladder.cost_N[peak]) // unit, float(loss[n])) for n in places]


def _widened(least: Numbers, moves: list[tuple[int, int, float]], gap: float, pick: NDArray[np.int16]) -> Numbers:
    """The least loss for every sum of units once this matrix has moved; which move it was is written to `pick`."""
    found = np.full_like(least, np.inf)
    for number, (_, units, loss) in enumerate(moves):
        source = slice(max(0, -units), len(least) - max(0, units))
        target = slice(max(0, units), len(least) - max(0, -units))
        if source.start >= len(least) or source.stop <= 0:
            continue
        moved = least[source] + loss
        better = (moved < found[target]) & (moved <= gap)
        found[target][better] = moved[better]
        pick[target][better] = number
    return found
