"""Ranks shared out among projections and experts of one layer or of all, by what each further rank is worth.

A rank is worth what the whitened error falls by: as a share of the projection's own size, or times the square of the
loss's gradient at what the projection puts out.
E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_compress.edits.factors import Part
from moe_compress.methods.factor_method import LayerExperts, Shapes, Spectra
from moe_compress.methods.factorisation.objectives import two_sided
from moe_compress.methods.factorisation.rank_allocation import allocate
from moe_compress.methods.factorisation.rank_allocation import spectra_of as spectra_of_experts
from moe_compress.methods.factorisation.sizes import OWN_RANKS, Side, Size, parameters
from moe_compress.methods.factorisation.structures import Grams
from moe_compress.methods.factorisation.whitening import TINY, Metrics, full_precision, leading

# Structures whose ranks may differ.
SHARED_OUT = (*OWN_RANKS, "shared_basis")
ALL = -1
FLOOR = 1


@torch.no_grad()
def spectra_of(layer: LayerExperts, structure: str, even: Mapping[Part, Size]) -> Spectra:
    """What each further rank is worth, descending, [min(O, I)] by projection and expert, from squared singular values.

    Of a core's deltas, what the mean leaves; of a shared basis one spectrum for all experts. Where the loss says how
    much outputs count, of the matrices as it sees them (`two_sided`); pairs with the original inputs change nothing.
    Values in units of the loss are compared as they are, others as shares of all of their projection's. even: sizes if
    nothing were shared out.
    """
    found: dict[tuple[Part, int], Tensor] = {}
    with full_precision():
        for part, weight_EOI in layer.weights.items():
            if part in layer.outputs:
                weight_EOI, _ = two_sided(structure, weight_EOI, layer.outputs[part], even[part])
            own, whole = _spectra(structure, weight_EOI, layer.grams[part], even[part].side)
            unit = 1.0 if part in layer.outputs else layer.gradients.get(part, 1 / max(whole, TINY))
            found |= {(part, e): (value_K * unit).cpu() for e, value_K in own.items()}
    return found


def _spectra(structure: str, weight_EOI: Tensor, grams: Grams | None, side: Side) -> tuple[dict[int, Tensor], float]:
    """(spectra by expert, the squares of all weights), both as the inputs see them."""
    metrics = Metrics(grams, weight_EOI)
    if structure == "shared_basis":
        value_K = _shared_spectrum(weight_EOI, metrics, side)
        return {ALL: value_K}, float(value_K.sum())
    whole = sum(metrics[e].squared(weight_OI.to(metrics.dtype)) for e, weight_OI in enumerate(weight_EOI))
    return dict(enumerate(spectra_of_experts(structure, weight_EOI, grams))), whole


def _shared_spectrum(weight_EOI: Tensor, metrics: Metrics, side: Side) -> Tensor:
    """What each further vector of a shared basis is worth: of the outputs, or of the inputs by their pooled Gram."""
    total, dtype = torch.zeros((), dtype=torch.float64, device=weight_EOI.device), metrics.dtype
    for e, weight_OI in enumerate(weight_EOI.to(dtype)):
        white = metrics.pooled.whiten(weight_OI) if side == "in" else weight_OI
        total = total + (white.T @ white if side == "in" else metrics[e].times(white) @ white.T)
    return leading(total, len(total))[0]


def share_out(
    spectra: Mapping[int, Spectra],
    shapes: Mapping[int, Shapes],
    even: Mapping[int, Mapping[Part, Size]],
    *,
    structure: str,
    ratio: float,
    multiple: int,
) -> dict[int, dict[Part, Size]]:
    """Sizes by layer and projection that store no more than `ratio` of all numbers together.

    even: their sizes if nothing were shared out.
    """
    cost: dict[tuple[int, Part, int], int] = {}
    budget = 0
    for index, found in spectra.items():
        for part, (experts, outputs, inputs) in shapes[index].items():
            budget += int(ratio * experts * outputs * inputs + 1e-6)
            budget -= parameters(structure, _with_ranks(even[index][part], [0] * experts), experts, outputs, inputs)
        for part, e in found:
            cost[index, part, e] = _unit(structure, even[index][part], *shapes[index][part])
    every = {(index, part, e): value_K for index, found in spectra.items() for (part, e), value_K in found.items()}
    ranks = allocate(every, cost, dict.fromkeys(every, 1.0), budget, FLOOR, multiple)
    return {
        index: {
            part: _with_ranks(size, [rank for key, rank in ranks.items() if key[:2] == (index, part)])
            for part, size in sizes.items()
        }
        for index, sizes in even.items()
    }


def _unit(structure: str, size: Size, experts: int, outputs: int, inputs: int) -> int:
    """Numbers that one more rank stores: of one expert, or of a basis."""
    if structure != "shared_basis":
        return outputs + inputs
    return parameters(structure, replace(size, rank=1), experts, outputs, inputs)


def _with_ranks(size: Size, ranks: list[int]) -> Size:
    return replace(size, ranks=ranks) if size.ranks else replace(size, rank=ranks[0])
