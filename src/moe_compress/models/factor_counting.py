"""How often the factors of experts are multiplied with a token, where that is not what a token uses of them.

What experts share, a token meets once, unless it lies on the side of the experts' own neurons; a residue is made whole
before it multiplies; bases that are mixed first are met as one mixture an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_compress.models.modeling.factored_experts import BASES, ENTERED, SparseMatrix
from moe_compress.models.moe import MoEView


def multiplied_times(view: MoEView, active: float, top_k: int, tokens: int) -> dict[int, float]:
    """By module: multiply-adds for each number that a token uses of it, where these are not one; tokens: in one run."""
    if not view.factored:
        return {}
    found = {
        id(each): each.in_features / each.values.shape[1]
        for each in view.experts.separate.modules()
        if isinstance(each, SparseMatrix)
    }
    normed = bool(getattr(view.experts, "has_post_expert_norm", False))
    for name, kind, module in _shared(view.experts):
        first = view.experts.separate[0][name]
        if first.enters(tokens, top_k) if name in ENTERED else first.leaves and not normed:
            continue
        found[id(module)] = active / len(first.mix.weight) if kind == BASES else active
    return found


def shared_modules(view: MoEView) -> list[nn.Module]:
    """What experts have in common, which every token uses whole."""
    return [module for _, _, module in _shared(view.experts)] if view.factored else []


def _shared(fused: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """The name of the matrices, the kind of what they share, and the module that holds it."""
    for name, parts in fused.shared_parts.items():
        for kind, module in parts.items():
            yield name, kind, module
