"""How much each layer gives up: the same everywhere, by one threshold over the model, or searched for.

A layer shrinks in steps, each with a cost; an allocation says how many steps each layer takes, so that a given
number of experts goes altogether. Every trimming method that ranks within layers can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_compress.calibration.model_statistics import Evaluate
from moe_compress.edits.edits import Edit
from moe_compress.models.shape import MoEShape

Budget = Literal["layer", "global", "search"]
Taken = dict[int, int]
POPULATION = 8
FURTHEST = 3


@dataclass(frozen=True, slots=True)
class Ladder:
    """The steps that one layer may take, in order; each removes `size` experts and costs costs[n]."""

    costs: tuple[float, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationSearch:
    """What a search needs: the edits of an allocation, what they are worth, and how many may be tried."""

    edits: Callable[[Taken], Sequence[Edit]]
    evaluate: Evaluate | None
    evaluations: int
    seed: int


def kept_counts(
    shapes: Sequence[MoEShape], keep: int | None, ratio: float | None, name: str, *, router_whole: bool
) -> dict[int, int]:
    """Experts left in each layer if all layers are treated alike: `keep`, or all but the fraction `ratio`.

    Raises ValueError for a count that a layer's router cannot work with (any will do while it stays whole), and where
    no layer would lose an expert.
    """
    if keep is None and (ratio is None or not 0 <= ratio < 1):
        raise ValueError(f"{name}.ratio={ratio}: the fraction of experts removed is in [0, 1).")
    counts: dict[int, int] = {}
    for shape in shapes:
        count = keep if keep is not None else shape.num_experts - int((ratio or 0) * shape.num_experts + 0.5)
        if not router_whole:
            shape.require(count)
        elif not 0 < count <= shape.num_experts:
            raise ValueError(f"layer {shape.layer} has {shape.num_experts} experts, so keep={count} is not possible.")
        counts[shape.layer] = count
    if all(counts[shape.layer] == shape.num_experts for shape in shapes):
        said = f"keep={keep}" if keep is not None else f"ratio={ratio}"
        least = min((1 if router_whole else shape.groups) / shape.num_experts for shape in shapes)
        most = max(shape.num_experts for shape in shapes)
        raise ValueError(
            f"{name} {said} would leave every layer all of its {most} experts: keep fewer, or say at least "
            f"ratio={least:.4g}."
        )
    return counts


def allocate(
    ladders: Mapping[int, Ladder],
    even: Taken,
    budget: Budget,
    search: AllocationSearch | None = None,
    uneven: Taken | None = None,
) -> tuple[Taken, dict[str, Any]]:
    """(steps per layer, report): as many experts go as with `even`, which is what every layer would take alike.

    uneven: where a search begins beside `even`; by default what a threshold on the costs would take. Raises
    ValueError if so many cannot go while every layer keeps what it needs.
    """
    if budget == "layer":
        return even, {}
    total = sum(steps * ladders[layer].size for layer, steps in even.items())
    threshold = by_threshold(ladders, total) if uneven is None else uneven
    if budget == "global" or search is None or search.evaluate is None:
        return threshold, {}
    return by_search(ladders, [even, threshold], search)


def by_threshold(ladders: Mapping[int, Ladder], total: int) -> Taken:
    """The cheapest steps of the whole model, each layer's in order, until `total` experts are gone."""
    pool = sorted((cost, layer, n) for layer, ladder in ladders.items() for n, cost in enumerate(_rising(ladder.costs)))
    size = next(iter(ladders.values())).size
    if total > len(pool) * size:
        raise ValueError(
            f"budget=global would drop {total} experts, but only {len(pool) * size} can go while every layer keeps "
            "the experts that its router needs."
        )
    taken = dict.fromkeys(ladders, 0)
    for _, layer, _ in pool[: total // size]:
        taken[layer] += 1
    return taken


def _rising(costs: Sequence[float]) -> list[float]:
    """No step seems cheaper than one that has to be taken before it."""
    return list(np.maximum.accumulate(costs)) if costs else []


def cheapest(costs: Sequence[Sequence[float]], total: int) -> list[int]:
    """One choice c per row with sum c = total and the least sum of costs[row][c], exactly (dynamic programming).

    Raises ValueError if no choice adds up to `total`.
    """
    best, choices = np.zeros(1), []
    for row in costs:
        table = np.full((len(row), len(best) + len(row) - 1), np.inf)
        for choice, cost in enumerate(row):
            table[choice, choice : choice + len(best)] = best + cost
        choices.append(table.argmin(0).astype(np.min_scalar_type(len(row))))
        best = table.min(0)
    if not 0 <= total < len(best) or not np.isfinite(best[total]):
        raise ValueError(f"no choice of one entry per layer adds up to {total}: 0 to {len(best) - 1} are possible.")
    found = []
    for choice in reversed(choices):
        found.append(int(choice[total]))
        total -= found[-1]
    return found[::-1]


def by_search(
    ladders: Mapping[int, Ladder], first: Sequence[Taken], search: AllocationSearch
) -> tuple[Taken, dict[str, Any]]:
    """Evolution over allocations of one total (EvoESAP, arXiv 2603.06003): steps move between two layers at a time.

    The best POPULATION allocations so far have children; every allocation is tried once. Deterministic for a seed.
    """
    if search.evaluations < 1 or search.evaluate is None:
        raise ValueError(f"budget=search needs at least 1 evaluation, not evaluations={search.evaluations}.")
    random = np.random.default_rng(search.seed)
    worth: dict[tuple[int, ...], float] = {}
    layers = list(ladders)
    waiting = list(dict.fromkeys(tuple(taken[layer] for layer in layers) for taken in first))
    idle = 0
    while len(worth) < search.evaluations and idle < 100 * search.evaluations:
        if not waiting:
            ranked = sorted(worth, key=lambda genome: (-worth[genome], genome))[:POPULATION]
            waiting = [_mutated(ranked[random.integers(len(ranked))], layers, ladders, random)]
        genome = waiting.pop(0)
        idle += genome in worth
        if genome not in worth:
            worth[genome] = search.evaluate(search.edits(dict(zip(layers, genome, strict=True))))
    best = min(worth, key=lambda genome: (-worth[genome], genome))
    report = {"evaluations": len(worth), "agreement": worth[best], "agreement_of_even": next(iter(worth.values()))}
    return dict(zip(layers, best, strict=True)), {"search": report}


def _mutated(
    genome: tuple[int, ...], layers: Sequence[int], ladders: Mapping[int, Ladder], random: np.random.Generator
) -> tuple[int, ...]:
    """One layer takes up to FURTHEST steps more, another as many fewer; unchanged if they cannot."""
    if len(genome) < 2:
        return genome
    more, fewer = random.choice(len(genome), 2, replace=False)
    room = min(len(ladders[layers[more]].costs) - genome[more], genome[fewer])
    steps = min(int(random.integers(1, FURTHEST + 1)), room)
    changed = list(genome)
    changed[more] += steps
    changed[fewer] -= steps
    return tuple(changed)
