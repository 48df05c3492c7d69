"""Grams made of others: rare experts lean on all tokens, large ones on energies alone, orders move with neurons."""

from __future__ import annotations

import torch

from moe_compress.methods.factorisation.grams import OrderedGrams, RescaledGrams, ShrunkGrams
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from support.experts import LazyGrams, experts, grams


def test_few_tokens_lean_on_all() -> None:
    own, counts = grams(3, 6) * torch.tensor([1000.0, 10.0, 0.0])[:, None, None], [1000.0, 10.0, 0.0]
    pooled = own.sum(0)
    shrunk = ShrunkGrams(own, pooled, counts, prior=10.0)
    torch.testing.assert_close(shrunk[1], own[1] / 2 + pooled * (10 / 1010) / 2)
    torch.testing.assert_close(shrunk[2], pooled / 1010)
    torch.testing.assert_close(shrunk[0], own[0], rtol=0.05, atol=10)
    assert len(shrunk) == 3 and torch.equal(ShrunkGrams(own, pooled, counts, prior=0.0)[1], own[1])
    weight = experts(3, 8, 6)
    assert solve("base_delta", weight, shrunk, Size(ranks=[2] * 3))[1]


def test_pooled_correlations_with_each_one_s_energies() -> None:
    gram = grams(3, 6)
    pooled = gram.sum(0)
    pooled[2] = pooled[:, 2] = 0
    diagonal = gram.diagonal(dim1=1, dim2=2)
    rescaled = RescaledGrams(pooled, diagonal)
    expected = diagonal[1].clone()
    expected[2] = 0
    torch.testing.assert_close(rescaled[1].diagonal(), expected)
    assert float(torch.linalg.eigvalsh(rescaled[1])[0]) > -1e-9 and len(rescaled) == 3
    scaled = torch.stack([gram[0], 4 * gram[0]])
    same = RescaledGrams(scaled.sum(0), scaled.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(same[1], scaled[1])


def test_inputs_in_another_order() -> None:
    weight, gram = experts(3, 8, 6), grams(3, 6)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    moved = torch.stack([weight[e][:, order[e]] for e in range(3)])
    ordered = OrderedGrams(LazyGrams(gram), order)
    size = Size(ranks=[3] * 3)
    expected = errors(weight, solve("svd", weight, gram, size)[0], gram)
    found = errors(moved, solve("svd", moved, ordered, size)[0], ordered)
    torch.testing.assert_close(found, expected)
