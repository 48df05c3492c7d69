"""How many numbers a structure stores, and the largest of it within a share of the experts.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_compress.methods.factorisation.structures import STRUCTURES

Side = Literal["in", "out"]
# MoBE's own share of bases: one for four experts (arXiv 2508.05257).
EXPERTS_PER_BASIS = 4
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
    if structure == "basis_mixture":
        return experts * outputs * size.rank + size.bases * size.rank * inputs + experts * size.bases
    raise ValueError(f"structure={structure}: allowed: {', '.join(STRUCTURES)}.")


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
) -> Size:
    """The largest size that stores at most ratio * E * O * I numbers, or the size of a rank.

    multiple: ranks of a ratio are rounded down to multiples of it, from there on. Raises ValueError for a ratio below
    the structure's floor, and for a rank that is not one.
    """
    if (ratio is None) == (rank is None):
        raise ValueError("say how large the factors may be by either ratio or rank.")
    base = Size(side=options.side, bases=_bases(structure, experts, options.bases))
    if structure == "sparse_low_rank":
        _require_residue(inputs, options)
        nonzeros = 0 if options.pattern else _nonzeros(ratio, rank, outputs, inputs, options.sparse)
        base = replace(base, pattern=options.pattern, nonzeros=nonzeros)

    def of(rank: int) -> Size:
        return replace(base, ranks=[rank] * experts) if structure in OWN_RANKS else replace(base, rank=rank)

    def stored(rank: int) -> int:
        return parameters(structure, of(rank), experts, outputs, inputs)

    most = largest_rank(structure, experts, outputs, inputs, options.side)
    if rank is not None:
        if not 1 <= rank <= most:
            raise ValueError(
                f"structure={structure} of matrices {outputs} x {inputs}: rank={rank} is not in 1..{most}."
            )
        return of(rank)
    assert ratio is not None
    budget = int(ratio * experts * outputs * inputs + 1e-6)
    if stored(1) > budget:
        raise ValueError(_too_little(structure, stored(1), experts, outputs, inputs, ratio))
    return of(_rounded(_last_within(stored, most, budget), multiple))


def _last_within(stored: Callable[[int], int], most: int, budget: int) -> int:
    """The largest rank up to `most` that stores no more than the budget; what is stored is linear in the rank."""
    step = stored(2) - stored(1)
    return min(most, 1 + (budget - stored(1)) // step)


def _rounded(rank: int, multiple: int) -> int:
    return rank - rank % multiple if rank >= multiple else rank


def largest_rank(structure: str, experts: int, outputs: int, inputs: int, side: Side) -> int:
    """Above, ranks say nothing new: all experts together span no more than this."""
    if structure == "shared_basis":
        return min(inputs, experts * outputs) if side == "in" else min(outputs, experts * inputs)
    smaller = min(outputs, inputs)
    return max(1, smaller // 2) if structure == "wrapper" else smaller


def _bases(structure: str, experts: int, bases: int | None) -> int:
    if structure != "basis_mixture":
        return 0
    if bases is None:
        return max(1, experts // EXPERTS_PER_BASIS)
    if not 1 <= bases <= experts:
        raise ValueError(f"structure=basis_mixture of {experts} experts: bases={bases} is not in 1..{experts}.")
    return bases


def _require_residue(inputs: int, options: SizeOptions) -> None:
    pattern = options.pattern
    if pattern is not None and (not 0 < pattern[0] < pattern[1] or inputs % pattern[1]):
        raise ValueError(f"pattern={pattern[0]}:{pattern[1]} does not divide {inputs} inputs.")
    if not 0 < options.sparse < 1:
        raise ValueError(f"sparse={options.sparse}: the residue's share of what is stored is above 0 and below 1.")


def _nonzeros(ratio: float | None, rank: int | None, outputs: int, inputs: int, sparse: float) -> int:
    """Of each row: a share of the budget, or what stands to the low rank as that share to the rest; at least one."""
    if ratio is not None:
        return min(inputs, max(1, int(sparse * ratio * inputs + 1e-6)))
    assert rank is not None
    return min(inputs, max(1, int(sparse / (1 - sparse) * rank * (outputs + inputs) / outputs + 1e-6)))


def _too_little(structure: str, least: int, experts: int, outputs: int, inputs: int, ratio: float) -> str:
    what = {
        "svd": "rank 1",
        "base_delta": "its core and rank 1",
        "wrapper": "its core and wrappers of rank 1",
        "shared_basis": "a basis of rank 1",
        "basis_mixture": "its bases of rank 1",
        "sparse_low_rank": "its residue and rank 1",
    }[structure]
    share = -(-least * 10**4 // (experts * outputs * inputs)) / 10**4
    return f"structure={structure} keeps at least {share:.4f} of {experts} experts ({what}): ratio={ratio:g} is less."
