"""How many numbers a structure stores, and the largest of it within a share of the experts.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_compress.methods.factorisation.structures import STRUCTURES

Side = Literal["in", "out"]
# MoBE's own share of bases: one for four experts (arXiv 2508.05257).
EXPERTS_PER_BASIS = 4
# A ratio is a decimal fraction: what it comes to may fall short of a whole number by less than this.
ROUNDING = 1e-6
# Structures in which every expert may have a rank of its own.
OWN_RANKS = ("svd", "base_delta", "sparse_low_rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a structure may use.

    ranks: of each expert (svd, base_delta, sparse_low_rank); rank: of all (wrapper, shared_basis, basis_mixture); side:
    the shared one, inputs or outputs (shared_basis); bases: n (basis_mixture); nonzeros: of each row of a residue, or
    pattern (n, m): n of every m inputs (sparse_low_rank).
    """

    ranks: list[int] = field(default_factory=list)
    rank: int = 0
    side: Side = "in"
    bases: int = 0
    nonzeros: int = 0
    pattern: tuple[int, int] | None = None

    def row_nonzeros(self, inputs: int) -> int:
        """Numbers that a residue keeps in every row."""
        return self.nonzeros if self.pattern is None else inputs * self.pattern[0] // self.pattern[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeOptions:
    """What only some structures ask besides a rank.

    side: the shared one (shared_basis); bases: n, None for a quarter of the experts (basis_mixture); sparse: the
    residue's share of what is stored, unless `pattern` (n, m) says which weights stay (sparse_low_rank).
    """

    side: Side = "in"
    bases: int | None = None
    sparse: float = 0.5
    pattern: tuple[int, int] | None = None


def parameters(structure: str, size: Size, experts: int, outputs: int, inputs: int) -> int:
    """Numbers that are stored for one projection."""
    both = outputs + inputs
    if structure == "svd":
        return sum(size.ranks) * both
    if structure == "base_delta":
        return outputs * inputs + sum(size.ranks) * both
    if structure == "sparse_low_rank":
        return sum(size.ranks) * both + experts * outputs * size.row_nonzeros(inputs)
    if structure == "wrapper":
        return outputs * inputs + experts * 2 * size.rank * both
    if structure == "shared_basis":
        shared, own = (inputs, outputs) if size.side == "in" else (outputs, inputs)
        return size.rank * (shared + experts * own)
    assert structure == "basis_mixture", structure
    return experts * outputs * size.rank + size.bases * size.rank * inputs + experts * size.bases


def mask_share(structure: str, itemsize: int) -> float:
    """What a residue's mask takes of experts' bytes, a bit of every weight; itemsize: bytes of a number, 0: nothing."""
    return 1 / (8 * itemsize) if structure == "sparse_low_rank" and itemsize else 0.0


def size_for(
    structure: str,
    experts: int,
    outputs: int,
    inputs: int,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    multiple: int = 1,
    options: SizeOptions = SizeOptions(),
    itemsize: int = 0,
) -> Size:
    """The largest size that stores at most ratio * E * O * I numbers, or the size of a rank.

    multiple: ranks of a ratio are rounded down to multiples of it, from there on; itemsize: bytes of a number, if the
    ratio is one of bytes, of which a residue's mask takes some. Raises ValueError for a ratio below
    the structure's floor, and for a rank that is not one.
    """
    if (ratio is None) == (rank is None):
        raise ValueError("say how large the factors may be by either ratio or rank.")
    smallest = _smallest(structure, experts, inputs, options)
    if rank is not None:
        most = largest_rank(structure, experts, outputs, inputs, options.side)
        if not 1 <= rank <= most:
            raise ValueError(
                f"structure={structure} of matrices {outputs} x {inputs}: rank={rank} is not in 1..{most}."
            )
        kept = options.sparse / (1 - options.sparse) * rank * (outputs + inputs) / outputs
        return _of_rank(smallest, rank, min(inputs, int(kept + ROUNDING)))
    assert ratio is not None
    least = smallest_ratio(structure, experts, outputs, inputs, options)
    mask = mask_share(structure, itemsize)
    budget = int((ratio - mask) * experts * outputs * inputs + ROUNDING)
    if budget < round(least * experts * outputs * inputs):
        raise ValueError(_too_little(structure, least + mask, experts, ratio))
    return _within(structure, (experts, outputs, inputs), budget, multiple, options)


def smallest_ratio(structure: str, experts: int, outputs: int, inputs: int, options: SizeOptions) -> float:
    """What the structure keeps of the experts at rank 1, and with one weight a row in a free residue."""
    size = _smallest(structure, experts, inputs, options)
    return parameters(structure, size, experts, outputs, inputs) / (experts * outputs * inputs)


def largest_rank(structure: str, experts: int, outputs: int, inputs: int, side: Side) -> int:
    """Above, ranks say nothing new: all experts together span no more than this."""
    if structure == "shared_basis":
        return min(inputs, experts * outputs) if side == "in" else min(outputs, experts * inputs)
    smaller = min(outputs, inputs)
    return max(1, smaller // 2) if structure == "wrapper" else smaller


def _smallest(structure: str, experts: int, inputs: int, options: SizeOptions) -> Size:
    """Rank 1. Raises ValueError for a structure or options that cannot be."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure}: allowed: {', '.join(STRUCTURES)}.")
    if structure == "basis_mixture":
        bases = max(1, experts // EXPERTS_PER_BASIS) if options.bases is None else options.bases
        if not 1 <= bases <= experts:
            raise ValueError(f"structure=basis_mixture of {experts} experts: bases={bases} is not in 1..{experts}.")
        return Size(rank=1, bases=bases)
    if structure == "sparse_low_rank":
        pattern = options.pattern
        if pattern is not None and (not 0 < pattern[0] < pattern[1] or inputs % pattern[1]):
            raise ValueError(f"pattern={pattern[0]}:{pattern[1]} does not divide {inputs} inputs.")
        if not 0 < options.sparse < 1:
            raise ValueError(f"sparse={options.sparse}: the residue's share of what is stored is above 0 and below 1.")
        return Size(ranks=[1] * experts, nonzeros=0 if pattern else 1, pattern=pattern)
    return Size(ranks=[1] * experts) if structure in OWN_RANKS else Size(rank=1, side=options.side)


def _of_rank(smallest: Size, rank: int, nonzeros: int) -> Size:
    """The same structure at another rank, and with so many weights a row where it keeps any freely."""
    kept = max(1, nonzeros) if smallest.nonzeros else 0
    if smallest.ranks:
        return replace(smallest, ranks=[rank] * len(smallest.ranks), nonzeros=kept)
    return replace(smallest, rank=rank)


def _within(structure: str, shape: tuple[int, int, int], budget: int, multiple: int, options: SizeOptions) -> Size:
    """The largest rank within the budget; a free residue first takes its share, but for what rank 1 needs."""
    experts, outputs, inputs = shape
    smallest = _smallest(structure, experts, inputs, options)
    spare = (budget // experts - outputs - inputs) // outputs
    nonzeros = min(inputs, int(options.sparse * budget / experts / outputs + ROUNDING), spare)
    one, two = (parameters(structure, _of_rank(smallest, rank, nonzeros), *shape) for rank in (1, 2))
    rank = min(largest_rank(structure, *shape, options.side), 1 + (budget - one) // (two - one))
    return _of_rank(smallest, rank - rank % multiple if rank >= multiple else rank, nonzeros)


def _too_little(structure: str, least: float, experts: int, ratio: float) -> str:
    what = {
        "svd": "rank 1",
        "base_delta": "its core and rank 1",
        "wrapper": "its core and wrappers of rank 1",
        "shared_basis": "a basis of rank 1",
        "basis_mixture": "its bases of rank 1",
        "sparse_low_rank": "its residue and rank 1",
    }[structure]
    share = math.ceil(least * 10**4 - ROUNDING) / 10**4
    return f"structure={structure} keeps at least {share:.4f} of {experts} experts ({what}): ratio={ratio:g} is less."
