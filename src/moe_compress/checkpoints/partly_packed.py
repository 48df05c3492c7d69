"""What a quantization_config says once weights that were packed are plain numbers, or layers have other numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.grid import grid_of
from moe_compress.checkpoints.formats.registry import EXPERTS, QUANTIZATION, format_in
from moe_compress.checkpoints.quantization_config import grids_of, packed_edits, packing_of, without_experts
from moe_compress.edits.apply import edits_by_layer
from moe_compress.edits.edits import Edit
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, layer_matrices, stored_matrices
from moe_compress.models.prediction_layers import prediction_layers

# Edits that make new numbers of experts; all others leave them out or move them.
NEW_NUMBERS = ("merge_experts", "keep_channels")
# A layer's number in a name, or in a pattern of names.
LAYER = re.compile(r"(layers(?:\.|\\\.))(\d+)(?=\.|\\\.|\*|$)")
EXPERT = re.compile(r"\.\d+\.[^.]+$")


def packed_kinds(model: PreTrainedModel, values: Mapping[str, Any]) -> set[Kind]:
    """Parts of layers of which config.json says that they are packed; a skeleton in plain numbers is enough."""
    layers, family = hf.decoder_layers(model), family_of(model.config)
    return {
        matrix.kind
        for edit in (packed_edits(model, values) if values.get(QUANTIZATION) else ())
        for matrix in layer_matrices(layers[edit.layer], family)
        if matrix.name in edit.bits
    }


def unpacked(values: Mapping[str, Any], model: PreTrainedModel, plain: Mapping[int, Collection[str]]) -> dict[str, Any]:
    """config.json values once these matrices, by layer, are plain numbers; without a config where nothing is packed.

    model: a skeleton in plain numbers.
    """
    config = values.get(QUANTIZATION)
    if not config or not any(plain.values()):
        return dict(values)
    format = format_in(values)
    grids, names = grids_of(model, values), dict[str, None]()
    for index, matrices in plain.items():
        for stored, (name, _) in stored_matrices(model, index).items() if matrices else ():
            stem = stored.removesuffix(".weight")
            if name in matrices and grid_of(stem, name, grids) is not None:
                names[EXPERT.sub("", stem) if ".experts." in name else stem] = None
        if any(grid.kinds for grid in grids) and any(".experts." in name for name in matrices):
            names[hf.layers_prefix(model) + f"{index}." + _experts_name(matrices)] = None
    changed = {**values, QUANTIZATION: format.leave_out(config, list(names))} if names else dict(values)
    kinds = packed_kinds(model, changed)
    if not kinds:
        del changed[QUANTIZATION]
    # Layers that predict further tokens are stored as they were for as long as a config says how.
    apart = EXPERTS in packing_of(values) and "experts" not in kinds
    return without_experts(changed) if apart and not (kinds and prediction_layers(values)) else changed


def _experts_name(matrices: Collection[str]) -> str:
    """The module that holds the experts, from the name of one of their stacks."""
    return next(name.rpartition(".")[0] for name in matrices if ".experts." in name)


def after_edits(values: Mapping[str, Any], model: PreTrainedModel, edits: Sequence[Edit]) -> dict[str, Any]:
    """config.json values once structural edits are carried out: what has new numbers is plain, layers are renumbered.

    model: a skeleton of the layers before them.
    """
    config = values.get(QUANTIZATION)
    if not config:
        return dict(values)
    layers, family = hf.decoder_layers(model), family_of(model.config)
    left = edits_by_layer(edits, len(layers))
    made = {index for index, found in left.items() if any(edit.edit in NEW_NUMBERS for edit in found)}
    plain = {i: [m.name for m in layer_matrices(layers[i], family, ("experts",))] for i in sorted(made)}
    changed = unpacked(values, model, plain)
    if QUANTIZATION in changed and len(left) < len(layers):
        places = {str(index): str(place) for place, index in enumerate(left)}
        changed[QUANTIZATION] = _renumbered(changed[QUANTIZATION], places)
    return changed


def _renumbered(said: Any, places: Mapping[str, str]) -> Any:
    """The same with the layers' new numbers in every name; names of layers that are gone go, too."""
    if isinstance(said, Mapping):
        pairs = ((_renamed(key, places), _renumbered(value, places)) for key, value in said.items())
        return {key: value for key, value in pairs if key is not None and value is not None}
    if isinstance(said, list):
        return [new for each in said if (new := _renumbered(each, places)) is not None]
    return _renamed(said, places) if isinstance(said, str) else said


def _renamed(name: str, places: Mapping[str, str]) -> str | None:
    found = LAYER.search(name)
    if found is None:
        return name
    place = places.get(found.group(2))
    return None if place is None else f"{name[: found.start(2)]}{place}{name[found.end(2) :]}"
