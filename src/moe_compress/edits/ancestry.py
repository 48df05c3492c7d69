"""Whose experts are whose: which experts and layers of the original a model's came from, after its edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_compress.edits.apply import edits_by_layer
from moe_compress.edits.edits import Edit, KeepExperts, MakeDense, MergeExperts


@dataclass(frozen=True)
class Ancestry:
    """Where each layer of a compressed model comes from, and what became of the original's experts.

    source: by layer, the original's; place: by layer, for each of the original's experts the one that it is now, or
    has gone into, -1 for one that is gone.
    """

    source: list[int]
    place: dict[int, list[int]]

    @classmethod
    def of(cls, edits: Sequence[Edit], total: int, experts: Mapping[int, int]) -> Ancestry:
        """From the edits of a model of `total` layers, with so many `experts` in each that has some."""
        by_layer = edits_by_layer(edits, total)
        went = {n: _went(found, experts[i]) for n, (i, found) in enumerate(by_layer.items()) if i in experts}
        return cls(list(by_layer), went)


def _went(edits: Sequence[Edit], experts: int) -> list[int]:
    place = list(range(experts))
    for edit in edits:
        if isinstance(edit, KeepExperts):
            new = {old: number for number, old in enumerate(edit.experts)}
        elif isinstance(edit, MergeExperts):
            new = {old: number for number, group in enumerate(edit.groups) for old in group}
        elif isinstance(edit, MakeDense):
            new = {}  # neurons of one MLP, which no router tells apart
        else:
            continue
        place = [new.get(expert, -1) for expert in place]
    return place
