"""Neurons in one order: planted shuffles are undone, functions stay, and a core fits better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compress.methods.expert_merge.alignment import permuted
from moe_compress.methods.factorisation.alignment import Reference, align
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.models.moe import Expert

COUNT, WIDTH, MODEL = 5, 12, 8


def shuffled_copies(noise: float, gated: bool = True) -> tuple[list[Expert], list[Tensor]]:
    """(one expert's noisy copies with their neurons shuffled, the shuffles)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = Expert(normal(WIDTH, MODEL) if gated else None, normal(WIDTH, MODEL), normal(MODEL, WIDTH))
    shuffles = [torch.randperm(WIDTH, generator=generator) for _ in range(COUNT)]
    copies = [
        Expert(
            None if first.gate is None else first.gate + noise * normal(WIDTH, MODEL),
            first.up + noise * normal(WIDTH, MODEL),
            first.down + noise * normal(MODEL, WIDTH),
        )
        for _ in shuffles
    ]
    return [permuted(copy, shuffle) for copy, shuffle in zip(copies, shuffles, strict=True)], shuffles


def function(expert: Expert, x_TD: Tensor) -> Tensor:
    gate = 1 if expert.gate is None else torch.nn.functional.silu(x_TD @ expert.gate.T)
    return (gate * (x_TD @ expert.up.T)) @ expert.down.T


@pytest.mark.parametrize("reference", ["nearest", "mean"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("gated", [True, False])
def test_planted_shuffles_are_undone(reference: Reference, noise: float, gated: bool) -> None:
    experts, shuffles = shuffled_copies(noise, gated)
    order_EF = align(experts.__getitem__, COUNT, reference)
    places = torch.stack([shuffle[order_F] for shuffle, order_F in zip(shuffles, order_EF, strict=True)])
    assert bool((places == places[0]).all())
    x_TD = torch.randn(7, MODEL, generator=torch.Generator().manual_seed(1))
    for expert, order_F in zip(experts, order_EF, strict=True):
        torch.testing.assert_close(function(permuted(expert, order_F), x_TD), function(expert, x_TD))
    assert torch.equal(order_EF, align(experts.__getitem__, COUNT, reference, workers=2))


def test_a_core_fits_what_is_aligned() -> None:
    experts, _ = shuffled_copies(0.3)
    order_EF = align(experts.__getitem__, COUNT)
    size = Size(ranks=[2] * COUNT)

    def lost(up_EFD: Tensor) -> float:
        return errors(up_EFD, solve("base_delta", up_EFD, None, size)[0], None)[0]

    aligned = [permuted(expert, order_F) for expert, order_F in zip(experts, order_EF, strict=True)]
    assert lost(torch.stack([expert.up for expert in aligned])) < 0.3 * lost(torch.stack([e.up for e in experts]))
