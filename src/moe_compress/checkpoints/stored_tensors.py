"""Weights that files hold as several tensors: put together as one, taken apart again, compared with config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compress.checkpoints.formats.registry import QUANTIZATION, format_in, formats
from moe_compress.checkpoints.formats.stored_weight import StoredWeight


def stored_parts(name: str, weight: StoredWeight) -> dict[str, Any]:
    """A weight by the names of its tensors."""
    return {f"{weight.stem(name)}{end}": part for end, part in weight.parts().items()}


def with_weights(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with one StoredWeight in place of its parts, as the config `values` say they are stored.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    config = values.get(QUANTIZATION)
    if not config:
        signs = tuple(layout.SIGN for each in formats().values() for layout in each.layouts)
        packed = next((name for name in tensors if name.endswith(signs)), None)
        if packed is not None:
            raise ValueError(f"{packed} is packed, but config.json has no quantization_config that says how.")
        return dict(tensors)
    format, found = format_in(values), dict(tensors)
    settings, foreign = format.settings(config), tuple(end for each in formats().values() for end in each.foreign)
    for name in tensors:
        if name.endswith(foreign):
            stem, _, last = name.rpartition(".")
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or symmetric weights.")
        for layout in format.layouts:
            if name.endswith(layout.SIGN):
                stem = name.removesuffix(layout.SIGN)
                held = [found.pop(part) for part in _parts(name, stem, layout, tensors)]
                found[f"{stem}{layout.END}"] = layout(*held, **settings)
    return found


def _parts(sign: str, stem: str, layout: type[StoredWeight], tensors: Mapping[str, Any]) -> list[str]:
    """The names of a weight's tensors. Raises ValueError unless all are there."""
    parts = [f"{stem}{end}" for end in layout.NAMES]
    absent = [part for part in parts if part not in tensors]
    if absent:
        raise ValueError(f"{absent[0]} is missing beside {sign}: fetch the checkpoint again.")
    return parts


def require_agreement(folder: Any, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if a packed matrix has other bits, or scales for other groups, than config.json says."""
    config = values.get(QUANTIZATION)
    grids = format_in(values).grids(config) if config else []
    for name, entry in tensors.items():
        disagreement = entry.disagreement(grids) if isinstance(entry, StoredWeight) else ""
        if disagreement:
            said = ", or ".join(f"{grid.bits} bits in groups of {grid.group_size or 'a row'}" for grid in grids)
            raise ValueError(f"{name} in {folder} {disagreement}: that is not {said}, as config.json says.")
