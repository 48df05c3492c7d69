"""Of structures of one size, the one whose factors lose least, as the inputs of a projection see it.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moe_compress.methods.factorisation.objectives import two_sided
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import Factors, Grams


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A projection in factors.

    losses: as `solve` returns them; lost: the last of them, as a share; plain, whitened: errors; tried: whitened, of
    each structure.
    """

    structure: str
    factors: Factors
    losses: list[float]
    lost: float
    plain: float
    whitened: float
    tried: dict[str, float] = field(default_factory=dict)


def best_structure(
    weight_EOI: Tensor,
    grams: Grams | None,
    sizes: Mapping[str, Size],
    left_grams: Grams | None = None,
    **words: Any,
) -> Solution:
    """The nearest of some structures: of equal errors the first.

    sizes: the structures to choose from, with what each may use; every one is solved, one is kept; left_grams: how much
    outputs count, if not alike (see `two_sided`); words: see `solve`. Raises ValueError if there is none.
    """
    best: Solution | None = None
    tried: dict[str, float] = {}
    for structure, size in sizes.items():
        found = _solution(structure, weight_EOI, grams, size, left_grams, words)
        tried[structure] = found.whitened
        if best is None or found.whitened < best.whitened:
            best = found
    if best is None:
        raise ValueError("structure=auto has none to choose from: no structure is as small as this ratio.")
    return replace(best, tried=tried)


def _solution(
    structure: str,
    weight_EOI: Tensor,
    grams: Grams | None,
    size: Size,
    left_grams: Grams | None,
    words: Mapping[str, Any],
) -> Solution:
    """One structure; where outputs count by themselves, so do its errors."""
    if left_grams is None:
        factors, losses = solve(structure, weight_EOI, grams, size, **words)
        plain, whitened = errors(weight_EOI, factors, grams)
        lost = whitened
    else:
        seen_EOI, undo = two_sided(structure, weight_EOI, left_grams, size)
        factors, losses = solve(structure, seen_EOI, grams, size, **words)
        _, lost = errors(seen_EOI, factors, grams)
        factors = undo(factors)
        plain, whitened = errors(weight_EOI, factors, grams, left_grams)
    return Solution(structure=structure, factors=factors, losses=losses, lost=lost, plain=plain, whitened=whitened)
