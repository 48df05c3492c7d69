"""What a method that leaves factors is given of a layer's experts, what it gives back, and what it tells the engine.

E experts, O outputs, I inputs, F inner neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_compress.edits.factors import Form, Part
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors, Grams
from moe_compress.models.moe import MoEView

# Of a layer's projections, (E, O, I).
Shapes = Mapping[Part, tuple[int, int, int]]
# What each further rank of a matrix is worth, by projection and expert (-1 for all of them), descending.
Spectra = Mapping[tuple[Part, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """The experts of one layer, as a method that factors them is given them.

    layer: its number; weights: [E, O, I] by projection; grams: sums of the outer products of what each expert's matrix
    multiplies, as much as its gate counts, or none for plain distance; crosses: the same sums of what it would multiply
    in the original model (rows) and does (columns), where a method asks for them; outputs: where it does, means of the
    outer products [O, O] of the loss's gradients at what it puts out; gradients: mean squares of these by projection;
    sizes: what was shared out among layers; linears: linear maps beside them [O, I] by name, with linear_grams, the
    same sums of theirs, as far as they were seen; stored: the dtype in which factors are stored.
    """

    layer: int
    weights: Mapping[Part, Tensor]
    grams: Mapping[Part, Grams | None]
    crosses: Mapping[Part, Grams] = field(default_factory=dict)
    outputs: Mapping[Part, Grams] = field(default_factory=dict)
    gradients: Mapping[Part, float] = field(default_factory=dict)
    sizes: Mapping[Part, Size] = field(default_factory=dict)
    linears: Mapping[str, Tensor] = field(default_factory=dict)
    linear_grams: Mapping[str, Tensor] = field(default_factory=dict)
    stored: torch.dtype = torch.float32

    @property
    def shapes(self) -> Shapes:
        """Of its projections."""
        return {part: (len(w), w.shape[1], w.shape[2]) for part, w in self.weights.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredLayer:
    """The factors that come out, by projection or linear map, and what is reported of each of them."""

    factors: Mapping[Part, Factors]
    report: Mapping[str, Mapping[str, Any]]
    linears: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factoring:
    """What a method that leaves factors tells the engine besides its run.

    forms: how a layer's projections will be held, as far as their shapes, the bytes of a number and the method's own
    parameters tell; linear_rank: the same of one linear map beside them;
    projections: those of a layer that are factored; order: in which the neurons of a layer's experts are put first
    [E, F], if in any. Of its parameters: pools, whether one Gram matrix does for all experts; crosses, outputs: whether
    it wants these of `LayerExperts`; shares_out, whether sizes depend on all layers; weighs, whether it wants
    `gradients`. spectra: of a layer; share_out: spectra of all layers, shapes and bytes of a number -> sizes by layer.
    """

    forms: Callable[..., dict[Part, Form]]
    linear_rank: Callable[..., int]
    projections: Callable[[Sequence[Part], Mapping[str, Any]], list[Part]]
    order: Callable[[MoEView, Mapping[str, Any]], Tensor | None]
    pools: Callable[[Mapping[str, Any]], bool]
    crosses: Callable[[Mapping[str, Any]], bool]
    outputs: Callable[[Mapping[str, Any]], bool]
    shares_out: Callable[[Mapping[str, Any]], bool]
    weighs: Callable[[Mapping[str, Any]], bool]
    spectra: Callable[..., Spectra]
    share_out: Callable[..., dict[int, dict[Part, Size]]]
