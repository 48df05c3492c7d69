"""Both halves of a core and its deltas are optima, and planted ones are found."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.base_delta import shared_mean
from moe_compress.methods.factorisation.sizes import Size, size_for
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.whitening import Metrics
from support.experts import experts, grams, planted


def test_the_core_is_the_least_squares_one() -> None:
    weight, gram = experts(4, 12, 10), grams(4, 10)
    lower = torch.linalg.cholesky(gram)
    inputs_LI = lower.transpose(1, 2).flatten(0, 1)
    outputs_LO = (weight @ lower).transpose(1, 2).flatten(0, 1)
    expected = torch.linalg.lstsq(inputs_LI, outputs_LO).solution.T
    torch.testing.assert_close(shared_mean(weight, Metrics(gram, weight)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_mean(weight, Metrics(None, weight)), weight.mean(0))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_deltas_are_the_best_for_their_core(shape: tuple[int, int]) -> None:
    weight, gram = experts(4, *shape), grams(4, shape[1])
    factors, losses = solve("base_delta", weight, gram, Size(ranks=[1, 2, 3, 4]), sweeps=1)
    least = 0.0
    for e, rank in enumerate((1, 2, 3, 4)):
        value = torch.linalg.svdvals((weight[e] - factors.core.double()) @ torch.linalg.cholesky(gram[e]))
        least += float((value[rank:] ** 2).sum())
    assert losses == pytest.approx([least], rel=1e-4)


@pytest.mark.parametrize("plain", [True, False])
def test_a_planted_core_is_found(plain: bool) -> None:
    weight, _ = planted(12, 32, 40, rank=2)
    seen = None if plain else grams(12, 40)
    factors, losses = solve("base_delta", weight, seen, Size(ranks=[2] * 12), sweeps=30)
    assert max(errors(weight, factors, seen)) < 1e-3 and losses[-1] < 1e-3 * losses[0]


def test_which_structure_is_better_depends_on_the_experts() -> None:
    gram = grams(8, 48)

    def white(structure: str, common: float) -> float:
        weight = experts(8, 32, 48, common)
        size = size_for(structure, 8, 32, 48, ratio=0.35)
        return errors(weight, solve(structure, weight, gram, size, sweeps=6)[0], gram)[1]

    assert white("svd", 0.0) < white("base_delta", 0.0)
    assert white("base_delta", 0.5) < 0.7 * white("svd", 0.5)
