"""structure=auto: for one projection the structure that loses least, as its inputs see it, of the same size.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import Factors, Grams


def best_structure(
    weight_EOI: Tensor, grams: Grams | None, sizes: Mapping[str, Size], *, sweeps: int = 4
) -> tuple[str, Factors, dict[str, float]]:
    """(the structure, its factors, the whitened error of each): of equal errors the first.

    sizes: the structures to choose from, with what each may use; every one is solved, one is kept. Raises ValueError
    if there is none.
    """
    if not sizes:
        raise ValueError("structure=auto has none to choose from: no structure is as small as this ratio.")
    best: tuple[str, Factors] | None = None
    found: dict[str, float] = {}
    for structure, size in sizes.items():
        factors, _ = solve(structure, weight_EOI, grams, size, sweeps=sweeps)
        error = errors(weight_EOI, factors, grams)[1]
        if best is None or error < min(found.values()):
            best = structure, factors
        found[structure] = error
    assert best is not None
    return *best, found
