"""Mixtures of bases: sweeps end at optima, planted ones are found, activations help where there are some."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.basis_mixture import Mixture
from moe_compress.methods.factorisation.sizes import Size, parameters
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import ACTIVATIONS, Factors
from moe_compress.methods.factorisation.whitening import Metrics
from support.experts import experts, grams, loss


@pytest.mark.parametrize("plain", [True, False])
def test_planted_mixtures_are_found_from_nearby(plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, bases, mix = (torch.randn(*shape, generator=generator) for shape in ((8, 12, 3), (2, 3, 20), (8, 2)))
    weight = left @ torch.einsum("en,nki->eki", mix, bases)
    metrics = Metrics(None if plain else grams(8, 20), weight)
    near = [part + 0.2 * torch.randn(part.shape, generator=generator) for part in (bases, mix)]
    losses = Mixture(weight, metrics, *near).solve(60)
    assert losses[-1] < 1e-4 * losses[0]


def test_from_its_own_start_it_gains_on_one_basis() -> None:
    weight, gram = experts(8, 12, 24, common=0.3), grams(8, 24)
    size = Size(rank=6, bases=2)
    factors, losses = solve("basis_mixture", weight, gram, size)
    assert factors.parameters == parameters("basis_mixture", size, 8, 12, 24)
    assert factors.bases.shape == (2, 6, 24) and factors.mix.shape == (8, 2) and factors.right == []
    assert losses[-1] < solve("shared_basis", weight, gram, Size(rank=6))[1][-1]


def test_the_bases_step_nears_least_squares() -> None:
    """Many sweeps of bases and left sides of one basis end where no small step gains."""
    weight, gram = experts(6, 10, 16, common=0.3), grams(6, 16, mixed=0.8)
    mixture = Mixture(weight, Metrics(gram, weight), torch.randn(2, 3, 16).double(), torch.rand(6, 2).double())
    losses = mixture.solve(200)
    assert losses[-1] < losses[0]
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        moved = mixture.bases_nkI + 1e-2 * torch.randn(2, 3, 16, generator=generator) * mixture.bases_nkI.std()
        parts = Factors(left=mixture.left, right=[], bases=moved, mix=mixture.mix_En)
        assert loss(weight, parts.dense(), gram) > losses[-1]


def test_all_bases_for_one_expert_each_are_its_own_low_rank() -> None:
    weight, gram = experts(4, 10, 16), grams(1, 16).expand(4, -1, -1)
    own = solve("svd", weight, gram, Size(ranks=[3] * 4))[1][-1]
    mixed = solve("basis_mixture", weight, gram, Size(rank=3, bases=4), sweeps=20)[1][-1]
    assert mixed <= own * (1 + 1e-4)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("plain", [True, False])
def test_an_activation(activation: str, plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, bases, mix = (torch.randn(*shape, generator=generator) for shape in ((8, 12, 3), (2, 3, 20), (8, 2)))
    weight = left @ ACTIVATIONS[activation](torch.einsum("en,nki->eki", mix, bases))
    gram = None if plain else grams(8, 20)
    linear = solve("basis_mixture", weight, gram, Size(rank=3, bases=2), sweeps=10)[0]
    factors, losses = solve(
        "basis_mixture", weight, gram, Size(rank=3, bases=2), sweeps=10, activation=activation, steps=100, lr=0.03
    )
    assert factors.activation == activation
    assert errors(weight, factors, gram)[1] < errors(weight, linear, gram)[1]
    measured = loss(weight, factors.dense(), torch.eye(20).expand(8, -1, -1) if plain else gram)
    assert measured == pytest.approx(min(losses[-101:]), rel=1e-3)
