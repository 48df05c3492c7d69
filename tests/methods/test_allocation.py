"""Sharing out a budget: against brute force, and a search that is never worse than its beginning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moe_compress.compression.search_objective import OriginalAgreement
from moe_compress.edits.edits import KeepExperts, SkipSublayer
from moe_compress.methods.allocation import AllocationSearch, Ladder, by_search, by_threshold, cheapest
from support.editing import IDS, cut, logits_of, original
from support.tiny import windows_of
from support.trimming import batched


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_choice_is_that_of_brute_force(seed):
    random = np.random.default_rng(seed)
    costs = [random.random(size).tolist() for size in random.integers(1, 6, 4)]
    costs[1][0] = float("inf")
    for total in range(sum(len(row) - 1 for row in costs) + 2):
        choices = [c for c in itertools.product(*(range(len(row)) for row in costs)) if sum(c) == total]
        worth = {c: sum(row[i] for row, i in zip(costs, c, strict=True)) for c in choices}
        possible = [c for c in choices if np.isfinite(worth[c])]
        if not possible:
            with pytest.raises(ValueError, match="adds up to"):
                cheapest(costs, total)
        else:
            assert worth[tuple(cheapest(costs, total))] == pytest.approx(min(worth.values()))


@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_takes_the_cheapest_steps_in_order(seed):
    random = np.random.default_rng(seed)
    ladders = {layer: Ladder(tuple(random.random(n).tolist()), 2) for layer, n in enumerate((3, 5, 4))}
    for total in range(0, 25, 2):
        taken = by_threshold(ladders, total)
        assert sum(taken.values()) * 2 == total and all(n <= len(ladders[i].costs) for i, n in taken.items())
        # No layer could give its last step back for a cheaper one: costs count as at least those before them.
        rising = {i: np.maximum.accumulate(ladder.costs) for i, ladder in ladders.items()}
        last = max((rising[i][n - 1] for i, n in taken.items() if n), default=0)
        assert all(rising[i][n] >= last for i, n in taken.items() if n < len(rising[i]))
    with pytest.raises(ValueError, match="only 24 can go"):
        by_threshold(ladders, 26)


def search_over(evaluate: Callable[[Sequence[Any]], float], evaluations: int, seed: int = 0) -> AllocationSearch:
    return AllocationSearch(
        edits=lambda taken: [tuple(taken.items())], evaluate=evaluate, evaluations=evaluations, seed=seed
    )


@pytest.mark.parametrize("evaluations", [1, 2, 3, 40])
def test_a_search_is_never_worse_than_where_it_began(evaluations):
    ladders = {layer: Ladder((0.0,) * 6, 1) for layer in (1, 4, 6, 7)}
    first = [{1: 3, 4: 3, 6: 3, 7: 3}, {1: 6, 4: 0, 6: 1, 7: 5}]
    aim = np.array([0, 6, 1, 5])
    tried: list[tuple[int, ...]] = []

    def worth(edits: Sequence[Any]) -> float:
        genome = tuple(dict(edits[0]).values())
        tried.append(genome)
        assert sum(genome) == 12 and all(0 <= steps <= 6 for steps in genome)
        return -float(np.abs(np.array(genome) - aim).sum())

    taken, report = by_search(ladders, first, search_over(worth, evaluations, seed=1))
    assert len(tried) == len(set(tried)) == evaluations == report["search"]["evaluations"]
    assert tried[: len(first)] == [tuple(start.values()) for start in first][:evaluations]
    found = worth([tuple(taken.items())])
    assert (
        found == report["search"]["agreement"] == max(worth([tuple(zip(ladders, g, strict=True))]) for g in list(tried))
    )
    assert evaluations < 40 or found > max(worth([tuple(start.items())]) for start in first)
    assert by_search(ladders, first, search_over(worth, evaluations, seed=1)) == (taken, report)


def test_a_search_ends_where_there_is_nothing_else_to_try():
    """Two layers of one step each have three allocations of one step: no more can be evaluated."""
    taken, report = by_search(
        {0: Ladder((0.0,), 1), 1: Ladder((0.0,), 1)}, [{0: 1, 1: 0}], search_over(lambda _: 0.5, 50)
    )
    assert report["search"]["evaluations"] == 2 and sum(taken.values()) == 1
    taken, report = by_search({0: Ladder((0.0,) * 3, 1)}, [{0: 2}], search_over(lambda _: 0.5, 50))
    assert (taken, report["search"]["evaluations"]) == ({0: 2}, 1)


@torch.no_grad()
def test_agreement_is_the_mean_overlap_of_next_token_distributions(sources):
    source = sources("mixtral")
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
    worth = OriginalAgreement(original(source), windows_of(IDS, mask))
    edits = [KeepExperts(0, (0, 2, 5)), KeepExperts(2, (1, 3, 4, 6)), SkipSublayer(1, "attention")]
    total = count = 0.0
    for row, real in zip(IDS, mask, strict=True):
        both = (batched(cut(source, some)).double() for some in ([], edits))
        p, q = (logits_of(model, row[real][None])[0, :-1].softmax(-1) for model in both)
        total, count = total + float(torch.minimum(p, q).sum()), count + len(p)
    assert worth(edits) == pytest.approx(total / count, rel=1e-5)
    assert worth([]) == pytest.approx(1, abs=1e-6)
    assert worth.evaluations == 2
