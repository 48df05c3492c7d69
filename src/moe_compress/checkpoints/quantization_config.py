"""What config.json says of packed weights: whether they can be read, and the room that they take in a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.grid import Grid, grid_of
from moe_compress.checkpoints.formats.modelopt import exported_config
from moe_compress.checkpoints.formats.registry import (
    DENSE,
    EXPERTS,
    QUANTIZATION,
    Format,
    format_in,
    formats,
)
from moe_compress.edits.edits import PackMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, layer_matrices, stored_matrices
from moe_compress.models.moe import moe_view
from moe_compress.utils.files import read_json

ONE_EXPERT = re.compile(r"experts\\?\.\d")
# Where NVIDIA's exports say what is packed, if not in config.json.
EXPORT = "hf_quant_config.json"
# What EXPERTS may say of fewer bits than quantization_config says.
FEW_BITS = ("fp4", "mxfp4", "nvfp4")


def with_inner_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values; what only a wrapper's language model says of packed weights is said of the whole model.

    Kimi-K2.5 is published so; its readers look in both places.
    """
    inner = hf.text_values(values)
    said = inner.pop(QUANTIZATION, None)
    if values.get(QUANTIZATION) or not said:
        return dict(values)
    return {**hf.with_text_values(values, inner), QUANTIZATION: said}


def with_export(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values; where they say nothing of packed weights, with what `hf_quant_config.json` beside it says."""
    path = folder / EXPORT
    if values.get(QUANTIZATION) or not path.is_file():
        return dict(values)
    exported = exported_config(read_json(path))
    return {**values, QUANTIZATION: exported} if exported else dict(values)


def packing_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config, with what config.json says apart of it of experts; empty where there is none."""
    config, inner = values.get(QUANTIZATION), hf.text_values(values)
    return {**({EXPERTS: inner[EXPERTS]} if EXPERTS in inner else {}), **config} if config else {}


def with_new_config(values: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values of a model that nothing was packed in, once something is as `new` says, and it alone."""
    return {**without_experts(values), QUANTIZATION: dict(new)}


def without_experts(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values that say nothing of experts apart; transformers says it in the quantization_config as well."""
    config, inner = values.get(QUANTIZATION), hf.text_values(values)
    changed = hf.with_text_values(values, {key: value for key, value in inner.items() if key != EXPERTS})
    return {**changed, QUANTIZATION: {k: v for k, v in config.items() if k != EXPERTS}} if config else changed


def require_readable(folder: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantized checkpoint in a layout that is not read, saying why."""
    config = values.get(QUANTIZATION)
    if not config:
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"{folder}: the quantization_config of config.json is no object.")
    kind, known = str(config.get("quant_method", "quantized")), {each.name: each for each in _read()}
    said, format = packing_of(values), known.get(kind)
    experts = said.get(EXPERTS)
    if experts in FEW_BITS and (format is None or experts not in format.experts):
        raise ValueError(f"{folder} stores experts in {experts} by its {EXPERTS}, which is not read: use a bf16 copy.")
    reason = _unreadable(format, said) if format is not None else "which is not read"
    if reason:
        stored, read = " ".join([kind, str(config.get("format", ""))]).strip(), [each.described for each in _read()]
        raise ValueError(
            f"{folder} is stored in {stored} format, {reason}: use a bf16 or fp32 copy, or {', '.join(read)}."
        )


def _unreadable(format: Format, config: Mapping[str, Any]) -> str:
    """Why a config is not read, patterns that are none included; empty if it is."""
    try:
        reason = format.unreadable(config)
        for grid in () if reason else format.grids(config):
            _ = grid.targeted, grid.ignored
    except (re.error, TypeError, AttributeError, KeyError, ValueError) as error:
        return f"whose settings say nothing that is known ({error})"
    return reason


def _read() -> list[Format]:
    """The formats that a config can name, those first that are written, too."""
    found = [each for each in formats().values() if each.layouts]
    return sorted(found, key=lambda each: (each.writer is None, each.name))


def grids_of(model: PreTrainedModel, values: Mapping[str, Any]) -> list[Grid]:
    """What config.json says is packed, without what stock transformers keeps plain in this architecture by itself."""
    config, format = packing_of(values), format_in(values)
    grids = format.grids(config) if config else []
    kept = tuple(rf"re:.*\.{re.escape(name)}(?:\.|$)" for name in hf.kept_plain(model)) if format.kept_by_stock else ()
    return [replace(grid, ignore=(*grid.ignore, *kept)) for grid in grids]


def packed_edits(model: PreTrainedModel, values: Mapping[str, Any]) -> list[PackMatrices]:
    """The edits that give a skeleton the room for what the config says is packed; none for a config without.

    Floating-point codes take the room of whole ones of as many bits. Raises ValueError for experts that are packed one
    by one where the architecture stores them as one stack.
    """
    grids = grids_of(model, values)
    layers, prefix = list(hf.decoder_layers(model)) if grids else [], hf.layers_prefix(model)
    # Names of tensors by matrix, found once for all layers of the same modules.
    known: dict[Any, dict[str, list[str]]] = {}
    edits: list[PackMatrices] = []
    for index, layer in enumerate(layers):
        kind = hf.layer_kind(layer)
        if kind not in known:
            known[kind] = _by_matrix(stored_matrices(model, index)) if any(grid.targets for grid in grids) else {}
        here = [grid for grid in grids if not (grid.kinds and _left_out(f"{prefix}{index}.", grid))]
        matrices = layer_matrices(layer, family_of(model.config))
        view = moe_view(layer, family_of(model.config))
        if view is not None and not view.unfused:  # experts of edited layers are no stack
            _require_as_stored(matrices, known[kind], here, f"{prefix}{index}.", model.config.model_type)
        found = _room(matrices, index, known[kind], here)
        if found is not None:
            edits.append(found)
    return edits


def _by_matrix(stored: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    """Matrix -> the tensors that hold it, one of each expert."""
    found: dict[str, list[str]] = {}
    for tensor, (matrix, _number) in stored.items():
        found.setdefault(matrix, []).append(tensor)
    return found


def _require_as_stored(
    matrices: Sequence[Matrix], alone: Mapping[str, Any], grids: Sequence[Grid], stem: str, model_type: str
) -> None:
    """Raise ValueError for experts of a stack that a grid of linear maps means."""
    for matrix in matrices:
        if matrix.kind != "experts" or matrix.name in alone or any("experts" in grid.kinds for grid in grids):
            continue
        experts, _, part = matrix.name.rpartition(".")
        if grid_of(f"{stem}{experts}.0.{part}_proj", matrix.name, grids) is not None:
            raise ValueError(
                f"quantization_config packs experts one by one, but {model_type} stores them as one stack, so that "
                "neither stock transformers nor this package finds them: use a bf16 copy."
            )


def _room(
    matrices: Sequence[Matrix], index: int, alone: Mapping[str, Sequence[str]], grids: Sequence[Grid]
) -> PackMatrices | None:
    """The same for one layer. alone: matrix -> tensors of such a layer that hold one of its experts' each."""
    bits: dict[str, list[int]] = {}
    group_sizes: dict[str, int] = {}
    for matrix in matrices:
        count, _, inputs = matrix.weight_BOI.shape
        for grid in grids:
            if matrix.kind in grid.kinds:
                bits[matrix.name], group_sizes[matrix.name] = [grid.bits] * count, math.gcd(grid.group_size, inputs)
    widths = {matrix.name: matrix.weight_BOI.shape[2] for matrix in matrices}
    each = any(ONE_EXPERT.search(word) for grid in grids for word in (*grid.targets, *grid.ignore))
    for name in [name for name in alone if name in widths and grids]:
        tensors = alone[name] if each else alone[name][:1]  # one expert stands for all, unless any is named
        grids_of = (grid_of(hf.renumbered(stored, index).removesuffix(".weight"), name, grids) for stored in tensors)
        for found in filter(None, grids_of):
            bits.setdefault(name, []).extend([found.bits] * (1 if each else len(alone[name])))
            group_sizes[name] = math.gcd(found.group_size, widths[name])
    return PackMatrices(index, {name: tuple(each) for name, each in bits.items()}, group_sizes) if bits else None


def _left_out(stem: str, grid: Grid) -> bool:
    """Whether a layer's stacks are left out of a grid by the name of their module."""
    return any(name.startswith(stem) and name.endswith(".experts") for name in grid.ignore)


def says_packed(values: Mapping[str, Any]) -> bool:
    """Whether a config says of any weights that they are packed, under stock names or in an edited architecture."""
    return format_in(values).name != DENSE


def scale_bytes(values: Mapping[str, Any]) -> Mapping[int, float]:
    """What a scale takes of a file by the bits of its codes, if not one number of the model's dtype for some inputs."""
    return format_in(values).scale_bytes(packing_of(values), hf.stored_dtype(values).itemsize)
