"""Of structures of one size, the one whose factors lose least, as the inputs of a projection see it.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import Factors, Grams


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A projection in factors. losses: as `solve` returns them; plain, whitened: errors; tried: whitened, of each."""

    structure: str
    factors: Factors
    losses: list[float]
    plain: float
    whitened: float
    tried: dict[str, float] = field(default_factory=dict)


def best_structure(weight_EOI: Tensor, grams: Grams | None, sizes: Mapping[str, Size], **words: Any) -> Solution:
    """The nearest of some structures: of equal errors the first.

    sizes: the structures to choose from, with what each may use; every one is solved, one is kept; words: see `solve`.
    Raises ValueError if there is none.
    """
    best: Solution | None = None
    tried: dict[str, float] = {}
    for structure, size in sizes.items():
        factors, losses = solve(structure, weight_EOI, grams, size, **words)
        plain, tried[structure] = errors(weight_EOI, factors, grams)
        if best is None or tried[structure] < best.whitened:
            best = Solution(
                structure=structure,
                factors=factors,
                losses=losses,
                plain=plain,
                whitened=tried[structure],
                tried=tried,
            )
    if best is None:
        raise ValueError("structure=auto has none to choose from: no structure is as small as this ratio.")
    return best
