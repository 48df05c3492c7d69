"""A low rank and the weights that it misses."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.sizes import Size, SizeOptions, parameters, size_for
from moe_compress.methods.factorisation.solve import errors, solve
from support.experts import experts, grams


@pytest.mark.parametrize("pattern", [None, (2, 8)])
def test_every_row_keeps_equally_many(pattern: tuple[int, int] | None) -> None:
    weight, gram = experts(3, 16, 24), grams(3, 24)
    size = size_for("sparse_low_rank", 3, 16, 24, ratio=0.6, options=SizeOptions(pattern=pattern))
    factors, _ = solve("sparse_low_rank", weight, gram, size)
    for residue in factors.residue:
        assert ((residue != 0).sum(1) == size.row_nonzeros(24)).all()
        if pattern:
            assert ((residue.unflatten(1, (-1, 8)) != 0).sum(2) == 2).all()
    assert factors.parameters == parameters("sparse_low_rank", size, 3, 16, 24) <= 0.6 * weight.numel()


@pytest.mark.parametrize("plain", [True, False])
def test_planted_spikes_are_found(plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, 20, 2, generator=generator) @ torch.randn(2, 2, 32, generator=generator)
    spikes = torch.zeros(2, 20, 32)
    places = torch.stack([torch.randperm(32, generator=generator)[:3] for _ in range(40)]).view(2, 20, 3)
    spikes.scatter_(2, places, 8.0 * (torch.rand(places.shape, generator=generator) - 0.5).sign())
    gram = None if plain else grams(2, 32, power=0.3)
    factors, losses = solve("sparse_low_rank", low + spikes, gram, Size(ranks=[2, 2], nonzeros=3), sweeps=30)
    assert losses[-1] < 1e-6 * losses[0] and max(errors(low + spikes, factors, gram)) < 1e-6
    assert all(torch.equal(r != 0, s != 0) for r, s in zip(factors.residue, spikes, strict=True))
