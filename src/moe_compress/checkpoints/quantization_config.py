"""What config.json says of packed weights: whether they can be read, and the room that they take in a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import DENSE, QUANTIZATION, Format, Grid, format_in, formats
from moe_compress.edits.edits import PackMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices, stored_matrices


def require_readable(folder: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantized checkpoint in a layout that is not read, saying why."""
    config = values.get(QUANTIZATION)
    if not config:
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"{folder}: the quantization_config of config.json is no object.")
    kind, known = str(config.get("quant_method", "quantized")), {each.name: each for each in _read()}
    try:
        reason = known[kind].unreadable(config) if kind in known else "which is not read"
        if not reason:
            known[kind].grids(config), known[kind].settings(config), known[kind].scale_bytes(config)
    except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError, re.error) as error:
        raise ValueError(
            f"{folder}: the quantization_config of config.json is no {kind} config: {type(error).__name__}, {error}."
        ) from error
    if reason:
        stored, read = " ".join([kind, str(config.get("format", ""))]).strip(), [each.described for each in _read()]
        raise ValueError(
            f"{folder} is stored in {stored} format, {reason}: use a bf16 or fp32 copy, or {', '.join(read)}."
        )


def _read() -> list[Format]:
    """The formats that a config can name, those first that are written, too."""
    found = [each for each in formats().values() if each.layouts]
    return sorted(found, key=lambda each: (each.writer is None, each.name))


def packed_edits(model: PreTrainedModel, values: Mapping[str, Any]) -> list[PackMatrices]:
    """The edits that give a skeleton the room for what the config says is packed; none for a config without.

    Floating-point codes take the room of whole ones of as many bits.
    """
    config = values.get(QUANTIZATION)
    grids = format_in(values).grids(config) if config else []
    edits: list[PackMatrices] = []
    layers = list(hf.decoder_layers(model)) if grids else []
    # Layers of the same modules have the same room, unless a pattern tells them apart by their numbers.
    alike = not any(re.search(r"\d", target.replace("\\d", "")) for grid in grids for target in grid.targets)
    known: dict[Any, PackMatrices | None] = {}
    alone: dict[Any, dict[str, tuple[str, int]]] = {}
    for index, layer in enumerate(layers):
        parameters = hf.layer_kind(layer)
        kind = parameters if alike else index
        if kind not in known:
            if parameters not in alone:
                alone[parameters] = stored_matrices(model, index) if any(grid.targets for grid in grids) else {}
            named = {hf.renumbered(name, index): place for name, place in alone[parameters].items()}
            known[kind] = _room(model, index, grids, named)
        found = known[kind]
        if found is not None:
            edits.append(replace(found, layer=index))
    return edits


def _room(
    model: PreTrainedModel, index: int, grids: Sequence[Grid], alone: Mapping[str, tuple[str, int]]
) -> PackMatrices | None:
    """The same for one layer; alone: its tensors that hold one matrix each, and which one."""
    matrices = layer_matrices(hf.decoder_layers(model)[index], family_of(model.config))
    bits: dict[str, list[int]] = {}
    group_sizes: dict[str, int] = {}
    for matrix in matrices:
        count, _, inputs = matrix.weight_BOI.shape
        for grid in grids:
            if matrix.kind in grid.kinds:
                bits[matrix.name], group_sizes[matrix.name] = [grid.bits] * count, math.gcd(grid.group_size, inputs)
    widths = {matrix.name: matrix.weight_BOI.shape[2] for matrix in matrices}
    # Of hundreds of experts one is asked for, unless a pattern tells them apart by their numbers.
    apart = any(re.search(r"experts\?\.\d", target) for grid in grids for target in grid.targets)
    known: dict[Any, Grid | None] = {}
    for stored, (name, number) in alone.items():
        if (asked := (name, number * apart)) not in known:
            known[asked] = _grid_of(stored.removesuffix(".weight"), name, grids)
        found = known[asked]
        if found is not None and name in widths:
            bits.setdefault(name, []).append(found.bits)
            group_sizes[name] = found.group_size or widths[name]
    return PackMatrices(index, {name: tuple(each) for name, each in bits.items()}, group_sizes) if bits else None


def _grid_of(stored: str, name: str, grids: Sequence[Grid]) -> Grid | None:
    """The grid whose targets name a matrix that is stored alone."""
    for grid in grids:
        for target in grid.targets:
            pattern = target.removeprefix("re:")
            if target.startswith("re:") and any(re.match(pattern, each) for each in (stored, f".layers.0.{name}")):
                return grid
    return None


def says_packed(values: Mapping[str, Any]) -> bool:
    """Whether a config says of any weights that they are packed, under stock names or in an edited architecture."""
    return format_in(values).name != DENSE


def scale_bytes(values: Mapping[str, Any]) -> float | None:
    """What a scale takes of a file, where it is not one number of the model's dtype for a group of inputs."""
    return format_in(values).scale_bytes(values.get(QUANTIZATION) or {})
