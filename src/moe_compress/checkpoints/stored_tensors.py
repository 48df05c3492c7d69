"""Weights that files hold as several tensors: put together as one, taken apart again, compared with config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from moe_compress.checkpoints.formats.registry import QUANTIZATION, format_in, formats
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.quantization_config import packing_of

# Scales of a cache of keys and values that engines keep in few bits: no module of the model has them.
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")


def beside_weights(names: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """Tensors that a quantization_config has beside the model's own: they go with their layers as they are."""
    return [name for name in names if name.endswith(CACHE_SCALES)] if values.get(QUANTIZATION) else []


def stored_parts(name: str, weight: StoredWeight) -> dict[str, Any]:
    """A weight by the names of its tensors."""
    return {f"{weight.stem(name)}{end}": part for end, part in weight.parts().items()}


def with_weights(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with one StoredWeight in place of its parts, as the config `values` say they are stored.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    config = values.get(QUANTIZATION)
    if not config:
        layouts = [layout for each in formats().values() for layout in each.layouts]
        packed = next((name for name in tensors if any(_is_sign(name, layout, tensors) for layout in layouts)), None)
        if packed is not None:
            raise ValueError(f"{packed} is packed, but config.json has no quantization_config that says how.")
        return dict(tensors)
    format, beside = format_in(values), {*beside_weights(tensors, values)}
    found = {name: tensor for name, tensor in tensors.items() if name not in beside}
    settings = format.settings(packing_of(values))
    for name in tensors:
        if format.foreign and name.endswith(format.foreign):
            stem, _, last = name.rpartition(".")
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or other weights.")
        for layout in format.layouts:
            stem = name.removesuffix(layout.SIGN)
            if _is_sign(name, layout, tensors):
                held = _parts(name, stem, layout, tensors)
                parts = [None if part is None else found.pop(part) for part in held]
                known = {each.name for each in fields(layout)}
                told = {key: value for key, value in settings.items() if key in known}
                found[f"{stem}{layout.END}"] = layout(*parts, **told)
                break
    return found


def _is_sign(name: str, layout: type[StoredWeight], tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor says that a weight lies so: a router's own `scale` (Gemma-4) has no codes beside it."""
    return name.endswith(layout.SIGN) and layout.reads(_dtypes(name.removesuffix(layout.SIGN), layout, tensors))


def _dtypes(stem: str, layout: type[StoredWeight], tensors: Mapping[str, Any]) -> dict[str, str]:
    """The dtypes of a weight's tensors that are there, by how their names end."""
    ends = (end for end in (*layout.NAMES, *layout.OPTIONAL) if f"{stem}{end}" in tensors)
    return {end: dtype_of(tensors[f"{stem}{end}"]) for end in ends}


def dtype_of(part: Any) -> str:
    """The dtype of a tensor in a file, or of what is read of one, in the words of safetensors."""
    return str(part.get_dtype() if hasattr(part, "get_dtype") else part.dtype)


def _parts(sign: str, stem: str, layout: type[StoredWeight], tensors: Mapping[str, Any]) -> list[str | None]:
    """The names of a weight's tensors, None for what it may lack. Raises ValueError unless all others are there."""
    parts = [f"{stem}{end}" for end in layout.NAMES]
    absent = [part for part in parts if part not in tensors]
    if absent:
        raise ValueError(f"{absent[0]} is missing beside {sign}: fetch the checkpoint again.")
    more = [f"{stem}{end}" for end in layout.OPTIONAL]
    return [*parts, *(name if name in tensors else None for name in more)]


def require_agreement(folder: Any, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if a packed matrix has other bits, or scales for other groups, than config.json says."""
    config = packing_of(values)
    grids = format_in(values).grids(config) if config else []
    for name, entry in tensors.items():
        disagreement = entry.disagreement(grids) if isinstance(entry, StoredWeight) else ""
        if disagreement:
            said = ", or ".join(f"{grid.bits} bits in groups of {grid.group_size or 'a row'}" for grid in grids)
            raise ValueError(f"{name} in {folder} {disagreement}: that is not {said}, as config.json says.")
