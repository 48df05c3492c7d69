"""The document's wrappers: stored as they are, fitted by optima, never better than a core and twice the rank."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.sizes import Size, parameters, size_for
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.whitening import Metrics
from moe_compress.methods.factorisation.wrapper import alternated
from support.experts import experts, grams, loss

SHAPES = [(16, 24), (24, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_the_wrapped_core(shape: tuple[int, int]) -> None:
    weight, gram = experts(5, *shape, common=0.3), grams(5, shape[1])
    core, wrappers, losses = alternated(weight, Metrics(gram, weight), 2, 3)
    eye_out, eye_in = (torch.eye(n, dtype=torch.float64) for n in shape)
    own = torch.stack(
        [(eye_out + w.out_left @ w.out_right) @ core @ (eye_in + w.in_left @ w.in_right) for w in wrappers]
    )
    factors, same = solve("wrapper", weight, gram, Size(rank=2), sweeps=3)
    torch.testing.assert_close(factors.dense().double(), own, rtol=1e-4, atol=1e-4)
    assert same == pytest.approx(losses) and loss(weight, own, gram) == pytest.approx(losses[-1], rel=1e-5)
    assert factors.left[0].shape == (shape[0], 4) and factors.right[0].shape == (4, shape[1])
    assert factors.parameters == parameters("wrapper", Size(rank=2), 5, *shape)
    for left, right in zip(factors.left, factors.right, strict=True):  # nothing cancels that is stored in few bits
        torch.testing.assert_close(left.T @ left, torch.eye(4), rtol=0, atol=1e-5)
        assert float(right.norm()) <= 1.001 * float((left @ right).norm())
    delta = factors.expert(0).double() - factors.core.double()
    assert float(torch.linalg.svdvals(delta)[4]) < 1e-4


def test_its_first_inner_step_is_the_optimum() -> None:
    """With no outer wrapper and a core that reaches everything, it is the best low rank of what the core lacks."""
    weight, gram = experts(3, 12, 12), grams(3, 12)
    core, _, _ = alternated(weight, Metrics(gram, weight), 2, 1)
    least = sum(
        float((torch.linalg.svdvals((weight[e] - core) @ torch.linalg.cholesky(gram[e]))[2:] ** 2).sum())
        for e in range(3)
    )
    assert solve("wrapper", weight, gram, Size(rank=2), sweeps=1)[1][0] < least


@pytest.mark.parametrize("common", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_core_and_twice_the_rank_is_never_worse(shape: tuple[int, int], common: float) -> None:
    weight, gram = experts(6, *shape, common=common), grams(6, shape[1])
    wrapped, losses = solve("wrapper", weight, gram, Size(rank=2), sweeps=8)
    free, found = solve("base_delta", weight, gram, Size(ranks=[4] * 6), sweeps=8)
    assert free.parameters == wrapped.parameters and found[-1] <= losses[-1]
    # From the wrapper's own core already, in one step.
    rest = weight - wrapped.core.double()
    best = solve("svd", rest, gram, Size(ranks=[4] * 6))[1]
    assert best[0] <= losses[-1] * (1 + 1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_as_the_document_solves_it(plain: bool) -> None:
    weight, gram = experts(4, 16, 24, common=0.5), grams(4, 24)
    seen = None if plain else gram
    size = size_for("wrapper", 4, 16, 24, rank=2)
    factors, losses = solve("wrapper", weight, seen, size, solver="adam", steps=200, lr=1e-2)
    assert len(losses) == 201 and losses[-1] < 0.7 * losses[0]
    measured = loss(weight, factors.dense(), torch.eye(24).expand(4, -1, -1) if plain else gram)
    assert measured == pytest.approx(losses[-1], rel=1e-3)
    again, _ = solve("wrapper", weight, seen, size, solver="adam", steps=200, lr=1e-2)
    other, _ = solve("wrapper", weight, seen, size, solver="adam", steps=200, lr=1e-2, seed=1)
    assert torch.equal(factors.dense(), again.dense()) and not torch.equal(factors.dense(), other.dense())
    documented, _ = solve("wrapper", weight, seen, size, solver="adam")
    by_turns, _ = solve("wrapper", weight, seen, size, sweeps=6)
    assert errors(weight, by_turns, seen)[1] < errors(weight, documented, seen)[1]


def test_a_core_of_zeros() -> None:
    half = experts(1, 16, 24)
    weight = torch.cat([half, -half])
    factors, losses = solve("wrapper", weight, None, Size(rank=2))
    assert factors.dense().isfinite().all() and losses[-1] <= 2 * float(half.square().sum())
