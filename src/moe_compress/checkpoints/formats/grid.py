"""Which weights a quantization_config means: names, patterns and classes, matched as its makers match them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_compress.models.matrices import Kind

# What compressed-tensors and its relatives call all linear maps at once, experts' included.
LINEAR = "Linear"
# Before a pattern of names; behind the name of a module, for all that is inside it.
PATTERN, INSIDE = "re:", "."
REPEATED_GROUP = re.compile(r"\)[*+{]")


class ModuleNames:
    """Names, modules with all that is inside them, patterns of names, and the class of all linear maps.

    Raises re.error for a pattern that is none, ValueError for one that repeats groups: it may take for ever.
    """

    def __init__(self, words: Sequence[str]) -> None:
        patterns = [word.removeprefix(PATTERN) for word in words if word.startswith(PATTERN)]
        endless = next((pattern for pattern in patterns if REPEATED_GROUP.search(pattern)), None)
        if endless is not None:
            raise ValueError(f"the pattern {endless[:80]} repeats a group")
        self.exact = frozenset(word for word in words if not word.startswith(PATTERN))
        # A published config may list every expert: one pattern of 20,000 names takes minutes.
        self.modules = frozenset(word.removesuffix(INSIDE) for word in self.exact if word.endswith(INSIDE))
        self.pattern = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None

    @functools.cache  # noqa: B019 - as few as there are formats' words
    def rank(self, name: str) -> int | None:
        """0 for a name itself, 1 for a pattern or a module that it is inside of, 2 for the class."""
        if name in self.exact:
            return 0
        if self.modules and any(name[:end] in self.modules for end in _ends(name)):
            return 1
        if self.pattern is not None and self.pattern.match(name):
            return 1
        return 2 if LINEAR in self.exact else None


def _ends(name: str) -> Iterator[int]:
    """Where the names of the modules end that a name is inside of, its own end included."""
    yield from (place for place, letter in enumerate(name) if letter == INSIDE)
    yield len(name)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Weights of few bits as a quantization_config tells of them.

    group_size: inputs that share a scale, 0 for a whole row; targets: names, names of modules with all that is
    inside them (`name.`), patterns (`re:...`) of names, or the class of modules that are stored one by one; ignore: the
    same of those that are none all the same; kinds: parts of a layer whose stacks are stored whole.
    """

    bits: int
    group_size: int
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()

    @functools.cached_property
    def targeted(self) -> ModuleNames:
        """Its targets, ready to be asked."""
        return ModuleNames(self.targets)

    @functools.cached_property
    def ignored(self) -> ModuleNames:
        """What it leaves out, ready to be asked."""
        return ModuleNames(self.ignore)


def grid_of(stored: str, name: str, grids: Sequence[Grid]) -> Grid | None:
    """The grid of a linear map that is stored alone under `stored` and called `name` in its layer; None for no grid.

    As compressed-tensors matches: a name itself goes before patterns, these before the class of all linear maps.
    """
    ranks = {rank: grid for grid in reversed(grids) if (rank := _rank(stored, name, grid)) is not None}
    return ranks[min(ranks)] if ranks else None


def _rank(stored: str, name: str, grid: Grid) -> int | None:
    """How narrowly a grid's targets name a linear map, 0 the most; None if they do not, or it is left out."""
    own = f".layers.0.{name}"
    # Experts have no names of their own in a layer: `experts.gate` would be taken for a router.
    if any(grid.ignored.rank(each) is not None for each in ([stored] if ".experts." in own else [stored, own])):
        return None
    rank = grid.targeted.rank(stored)
    return rank if rank is not None else grid.targeted.rank(own)
