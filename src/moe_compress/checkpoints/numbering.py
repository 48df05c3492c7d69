"""The numbers in tensor names: layers and experts are counted from 0 without a gap, or names are not to be trusted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from moe_compress.models import hf

EXPERT = re.compile(r"(.*\.experts)\.(-?\d+)\.(.*)")


def require_numbering(folder: Any, keys: Iterable[str], num_layers: int) -> None:
    """Raise ValueError for a layer, or one tensor of an expert, whose number does not follow those before it."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    found["layers", ""] = set(range(num_layers))
    for key in keys:
        layer, expert = hf.layer_of(key), EXPERT.match(key)
        if layer is not None:
            found["layers", ""].add(layer)
        if expert is not None:
            found[expert[1], expert[3]].add(int(expert[2]))
    for (place, part), numbers in found.items():
        odd = sorted(numbers - set(range(len(numbers))))
        if odd:
            name = ".".join(filter(None, (place, str(odd[-1 if odd[0] >= 0 else 0]), part)))
            raise ValueError(
                f"{folder} holds {name}, but its {len(numbers)} {place.rpartition('.')[2]} are numbered 0 to "
                f"{len(numbers) - 1}: it is broken; fetch it again."
            )
