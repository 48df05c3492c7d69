"""Matrices of experts that a checkpoint holds twice, fused and one by one: which of the two is meant, nothing says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from moe_compress.models import hf

# Where experts are held, the number of one of them, its matrix, and what is stored of that.
MATRIX = re.compile(r"(.*)\.experts\.(?:(\d+)\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)(?:[._](.+))?")
PARTS = {
    "gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",),
    "w1": ("gate",), "w3": ("up",), "w2": ("down",),
}  # fmt: skip


def require_stored_once(folder: Any, keys: Iterable[str]) -> None:
    """Raise ValueError for a matrix of experts that stands in two tensors of a layer: one would go unread."""
    found: dict[tuple[object, str, str], dict[str | None, str]] = {}
    for key in keys:
        match = MATRIX.fullmatch(key)
        if match is None:
            continue
        place, expert, name, kind = match.groups()
        layer = hf.layer_of(key)
        for part in PARTS[name]:
            held = found.setdefault((place if layer is None else layer, part, kind or "weight"), {})
            others = held if expert is None else {each: held[each] for each in (None, expert) if each in held}
            if others:
                raise ValueError(
                    f"{folder} holds both {next(iter(others.values()))} and {key}, which say the same matrix twice: "
                    "remove the one that does not belong."
                )
            held[expert] = key
