"""Objectives are the same algebra on other matrices: against decompositions of what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compress.methods.factorisation.objectives import anchored_target, two_sided
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from support.experts import experts, grams


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_anchored_factors_make_up_for_what_came_before() -> None:
    """Two layers in a row: the second one's factors see what the first one's made of their inputs."""
    tokens, first, second = normal(400, 12), normal(16, 12, seed=1), normal(10, 16, seed=2)
    inputs = torch.relu(tokens @ first.T)
    short, _ = solve("svd", first[None], (tokens.T @ tokens)[None], Size(ranks=[6]))
    changed = torch.relu(tokens @ short.expert(0).double().T)

    def lost(target: Tensor, gram: Tensor) -> float:
        factors, _ = solve("svd", target[None], gram[None], Size(ranks=[5]))
        return float((inputs @ second.T - changed @ factors.expert(0).double().T).square().sum())

    target = anchored_target(second, inputs.T @ changed, changed.T @ changed)
    expected = torch.linalg.lstsq(changed, inputs @ second.T).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-4)
    assert lost(target, changed.T @ changed) < 0.99 * lost(second, inputs.T @ inputs)
    assert lost(target, changed.T @ changed) < 0.99 * lost(second, changed.T @ changed)


def test_anchored_to_the_same_inputs_is_the_weight() -> None:
    weight, gram = normal(6, 10), grams(1, 10)[0]
    torch.testing.assert_close(anchored_target(weight, gram, gram), weight.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(anchored_target(weight, gram * 0, gram * 0), weight.float())
    few = normal(3, 10, seed=4)
    torch.testing.assert_close(anchored_target(weight, few.T @ few, few.T @ few), weight.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_two_sided_svd_is_the_optimum_of_both_sides(shape: tuple[int, int]) -> None:
    weight, gram, left_gram = experts(3, *shape), grams(3, shape[1]), grams(3, shape[0], seed=7)
    size = Size(ranks=[4] * 3)
    seen, undo = two_sided("svd", weight, left_gram, size)
    factors = undo(solve("svd", seen, gram, size)[0])
    right, left = torch.linalg.cholesky(gram), torch.linalg.cholesky(left_gram)
    for e in range(3):
        least = float((torch.linalg.svdvals(left[e].T @ weight[e] @ right[e])[4:] ** 2).sum())
        found = left[e].T @ (weight[e] - factors.expert(e).double()) @ right[e]
        assert float(found.square().sum()) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        ("base_delta", Size(ranks=[3] * 4)),
        ("wrapper", Size(rank=2)),
        ("shared_basis", Size(rank=4)),
        ("shared_basis", Size(rank=4, side="out")),
        ("basis_mixture", Size(rank=4, bases=2)),
    ],
)
def test_two_sided_gains_where_outputs_matter_unevenly(structure: str, size: Size) -> None:
    weight, gram = experts(4, 14, 10, common=0.3), grams(4, 10)
    left_gram = grams(4, 14, mixed=0.1, seed=7, power=2.0)

    def lost(dense: Tensor) -> float:
        error = weight - dense.double()
        return float(torch.einsum("eop,epi,eij,eoj->", left_gram, error, gram, error))

    seen, undo = two_sided(structure, weight, left_gram, size)
    factors = undo(solve(structure, seen, gram, size)[0])
    one_sided = solve(structure, weight, gram, size)[0]
    assert lost(factors.dense()) < lost(one_sided.dense())
    assert factors.parameters == one_sided.parameters and factors.dense().dtype == torch.float32


@pytest.mark.parametrize("structure", ["svd", "base_delta"])
def test_tiny_gradients_make_no_huge_factors(structure: str) -> None:
    weight, gram, size = experts(3, 14, 10), grams(3, 10), Size(ranks=[3] * 3)
    left_gram = grams(3, 14, seed=7)
    found = []
    for unit in (1.0, 1e-14):
        seen, undo = two_sided(structure, weight, left_gram * unit, size)
        found.append(undo(solve(structure, seen, gram, size)[0]))
    torch.testing.assert_close(found[0].dense(), found[1].dense(), rtol=1e-3, atol=1e-3)
    assert max(float(part.abs().max()) for part in (*found[1].left, *found[1].right)) < 100


def test_two_sided_with_equal_outputs_changes_nothing() -> None:
    weight, gram, size = experts(4, 14, 10, common=0.3), grams(4, 10), Size(ranks=[3] * 4)
    seen, undo = two_sided("base_delta", weight, torch.eye(14).expand(4, -1, -1), size)
    expected = errors(weight, solve("base_delta", weight, gram, size)[0], gram)
    assert errors(weight, undo(solve("base_delta", seen, gram, size)[0]), gram) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="would not stay sparse"):
        two_sided("sparse_low_rank", weight, gram, size)
