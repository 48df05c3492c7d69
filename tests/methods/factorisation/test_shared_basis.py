"""A shared side is the best one that there is."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import solve
from support.experts import experts, grams, loss


def test_shared_outputs_are_the_optimum_for_any_grams() -> None:
    weight, gram = experts(4, 12, 10), grams(4, 10)
    white = (weight @ torch.linalg.cholesky(gram)).transpose(0, 1).flatten(1)
    least = float((torch.linalg.svdvals(white)[3:] ** 2).sum())
    factors, losses = solve("shared_basis", weight, gram, Size(rank=3, side="out"))
    assert losses == pytest.approx([least], rel=1e-5)
    assert factors.left == [] and factors.basis.shape == (12, 3) and factors.right[0].shape == (3, 10)


@pytest.mark.parametrize("plain", [True, False])
def test_a_shared_subspace_is_the_optimum_for_a_common_gram(plain: bool) -> None:
    weight, gram = experts(4, 10, 16), grams(1, 16).expand(4, -1, -1)
    lower = torch.eye(16).double() if plain else torch.linalg.cholesky(gram[0])
    least = float((torch.linalg.svdvals((weight @ lower).flatten(0, 1))[5:] ** 2).sum())
    factors, losses = solve("shared_basis", weight, None if plain else gram, Size(rank=5))
    assert losses[0] == pytest.approx(least, rel=1e-5) and losses[-1] == pytest.approx(least, rel=1e-5)
    assert factors.right == [] and factors.basis.shape == (5, 16) and factors.left[0].shape == (10, 5)


def test_left_sides_are_the_best_for_their_basis_and_sweeps_gain() -> None:
    weight, gram = experts(5, 10, 16, common=0.3), grams(5, 16, mixed=0.9)
    factors, losses = solve("shared_basis", weight, gram, Size(rank=4), sweeps=12)
    assert losses[-1] < losses[0]
    basis, lower = factors.basis.double(), torch.linalg.cholesky(gram)
    best = [torch.linalg.lstsq((basis @ lower[e]).T, (weight[e] @ lower[e]).T).solution.T @ basis for e in range(5)]
    assert loss(weight, torch.stack(best), gram) == pytest.approx(losses[-1], rel=1e-4)


def test_a_rank_above_the_smaller_side() -> None:
    weight, gram = experts(4, 6, 16), grams(4, 16)
    losses = [solve("shared_basis", weight, gram, Size(rank=rank))[1][-1] for rank in (4, 8, 12, 16)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-6 * losses[0]
