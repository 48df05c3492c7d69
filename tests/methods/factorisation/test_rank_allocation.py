"""Ranks out of one budget, against every choice that there is."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from moe_compress.methods.factorisation.rank_allocation import allocate, allowed_ranks, spectra_of
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import solve
from support.experts import experts, grams


def worth(spectra: dict[str, Tensor], weight: dict[str, float], ranks: dict[str, int]) -> float:
    return sum(weight[key] * float(spectra[key][:rank].sum()) for key, rank in ranks.items())


def best_of_all(
    spectra: dict[str, Tensor], cost: dict[str, int], weight: dict[str, float], budget: int, floor: int, multiple: int
) -> float:
    ladders = [allowed_ranks(len(spectrum), floor, multiple) for spectrum in spectra.values()]
    fitting = (
        dict(zip(spectra, ranks, strict=True))
        for ranks in itertools.product(*ladders)
        if sum(cost[key] * rank for key, rank in zip(spectra, ranks, strict=True)) <= budget
    )
    return max(worth(spectra, weight, ranks) for ranks in fitting)


def instance(seed: int, keys: int, most: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    spectra = {
        f"matrix {k}": (torch.rand(most - k % 2, generator=generator, dtype=torch.float64) ** 3).sort(descending=True)[
            0
        ]
        for k in range(keys)
    }
    return spectra, {key: float(torch.rand(1, generator=generator)) + 0.1 for key in spectra}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("alike", [True, False])
def test_it_is_the_optimum(seed: int, multiple: int, alike: bool) -> None:
    spectra, weight = instance(seed, keys=4, most=7)
    draw = random.Random(seed)
    cost = {key: 7 if alike else draw.randint(2, 13) for key in spectra}
    floor = seed % 3
    least = floor * sum(cost.values())
    for share in (0.0, 0.15, 0.4, 0.7, 1.0):
        budget = int(least + share * sum(cost[key] * len(spectra[key]) for key in spectra))
        try:
            found = allocate(spectra, cost, weight, budget, floor, multiple)
        except ValueError:
            assert share == 0.0 and multiple > 1  # a floor that is no multiple
            continue
        assert sum(cost[key] * rank for key, rank in found.items()) <= budget
        assert all(rank in allowed_ranks(len(spectra[key]), floor, multiple) for key, rank in found.items())
        expected = best_of_all(spectra, cost, weight, budget, floor, multiple)
        assert worth(spectra, weight, found) == pytest.approx(expected, rel=1e-12)


def test_alike_the_largest_values_are_taken() -> None:
    spectra, weight = instance(5, keys=40, most=64)
    found = allocate(spectra, dict.fromkeys(spectra, 10), weight, 10 * 500 + 9, 0, 1)
    values = sorted((weight[key] * float(v) for key, values in spectra.items() for v in values), reverse=True)
    assert sum(found.values()) == 500
    assert worth(spectra, weight, found) == pytest.approx(sum(values[:500]))


def test_a_whole_model_is_quick_and_nearly_at_the_bound() -> None:
    spectra, weight = instance(0, keys=1500, most=96)
    cost = {key: 2816 if k % 3 else 4096 for k, key in enumerate(spectra)}
    budget = sum(cost[key] * len(spectra[key]) for key in spectra) // 3
    found = allocate(spectra, cost, weight, budget, 1, 16)
    spent = sum(cost[key] * rank for key, rank in found.items())
    assert 0 <= budget - spent < 4096


def test_copies_of_one_matrix_share_evenly() -> None:
    spectra, _ = instance(0, keys=1, most=32)
    alike = {str(k): spectra["matrix 0"] for k in range(300)}
    found = allocate(alike, dict.fromkeys(alike, 3), dict.fromkeys(alike, 1.0), 3 * 300 * 16, 1, 16)
    assert set(found.values()) == {16}


def test_more_than_all_and_less_than_the_floors() -> None:
    spectra, weight = instance(1, keys=3, most=5)
    cost = dict.fromkeys(spectra, 4)
    assert [*allocate(spectra, cost, weight, 10**6, 1, 1).values()] == [len(values) for values in spectra.values()]
    assert [*allocate(spectra, cost, weight, 12, 1, 1).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="ranks of at least 1 take 12 parameters of 3 matrices: 11 is less"):
        allocate(spectra, cost, weight, 11, 1, 1)
    nothing = {key: torch.zeros(4) for key in spectra}
    assert sum(allocate(nothing, cost, weight, 20, 1, 1).values()) <= 5


@pytest.mark.parametrize("structure", ["svd", "base_delta"])
def test_ranks_by_spectra_lose_less_than_even_ones(structure: str) -> None:
    weight, gram = experts(6, 16, 24, common=0.4), grams(6, 24)
    weight[0] = weight[1] + 0.1 * weight[0]
    even = Size(ranks=[4] * 6)
    by_size = torch.tensor([1.0, 2.0, 5.0, 0.3, 0.1, 1.0])[:, None, None]
    spectra = dict(enumerate(spectra_of(structure, weight, gram * by_size)))
    assert all(len(values) == 16 and bool((values.diff() <= 0).all()) for values in spectra.values())
    found = allocate(spectra, dict.fromkeys(spectra, 40), dict.fromkeys(spectra, 1.0), 40 * 24, 0, 1)
    shared_out = Size(ranks=[*found.values()])
    losses = [solve(structure, weight, gram * by_size, size)[1][0] for size in (even, shared_out)]
    assert sum(shared_out.ranks) == 24 and losses[1] < losses[0]
    kept = sum(float(spectra[e][rank:].sum()) for e, rank in found.items())
    assert losses[1] == pytest.approx(kept, rel=1e-5)


def test_allowed_ranks() -> None:
    assert allowed_ranks(40, 14, 16) == [14, 15, 16, 32]
    assert allowed_ranks(40, 20, 16) == [32] and allowed_ranks(20, 18, 16) == [16] and allowed_ranks(4, 8, 16) == [4]
    assert allowed_ranks(3, 0, 1) == [0, 1, 2, 3]
