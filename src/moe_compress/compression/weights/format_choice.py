"""In which format a weight stage is stored, what then goes into config.json, and how many inputs share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import (
    DENSE,
    EDITED_PACKED,
    QUANTIZATION,
    Packing,
    Request,
    Writer,
    formats,
)
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import Edit, PackMatrices
from moe_compress.methods.quantization.grid import BITS
from moe_compress.methods.quantization.quantize import group_size_for
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, Matrix, kinds_of, layer_matrices, stored_matrices
from moe_compress.recipes.recipe import Stage

# What format=auto stands for: the first that can hold the matrices.
AUTO = ("compressed-tensors", EDITED_PACKED)
Bits = Mapping[int, Mapping[str, Sequence[int]]]


def format_of(stage: Stage, model: PreTrainedModel) -> str:
    """The name of a format that is written. Raises ValueError for one that the model's experts cannot have."""
    wanted = str(stage.parameters.get("format", DENSE))
    if wanted == DENSE or not any(_chosen(stage, model).values()):
        return DENSE
    if wanted == "auto":
        return next(name for name in AUTO if not _one_width(stage, name) and not _refused(stage, model, name))
    if _one_width(stage, wanted):
        raise ValueError(f"format={wanted} holds one width for all experts: bits=auto needs format=packed or dense.")
    reason = _refused(stage, model, wanted)
    if reason:
        raise ValueError(f"format={wanted} {reason}: use format=packed or format=dense.")
    return wanted


def _writer(format: str) -> Writer:
    writer = formats()[format].writer
    assert writer is not None, format
    return writer


def _one_width(stage: Stage, format: str) -> bool:
    """Whether bits differ between matrices, of which a plain format holds one width."""
    return _writer(format).parts is not None and stage.parameters["bits"] == "auto"


def _refused(stage: Stage, model: PreTrainedModel, format: str) -> str:
    """Why a format cannot hold the chosen matrices; empty if it can."""
    writer, chosen = _writer(format), _chosen(stage, model)
    if writer.parts is None:
        return ""
    lacking = _without_names(model, chosen)
    if lacking:
        return f"packs matrices one by one, but {model.config.model_type} stores {lacking} together with others"
    kinds = frozenset(matrix.kind for found in chosen.values() for matrix in found)
    bits, group_size = int(stage.parameters["bits"]), int(stage.parameters["group_size"])
    reason = writer.refuses(Request(kinds=kinds, bits=bits, group_size=group_size))
    if reason:
        return reason
    for which, alike in _alike(chosen, writer).items():
        if alike and not group_size_for([m.weight_BOI.shape[2] for _, m in alike], stage.parameters["group_size"]):
            return f"needs one group size for all of {which}, and no group of 8 and more divides all widths"
    return ""


def _alike(chosen: Mapping[int, Sequence[Matrix]], writer: Writer) -> dict[str, list[tuple[int, Matrix]]]:
    """Matrices that have to share one group size, by what messages call them."""
    packed = [(i, m) for i, matrices in chosen.items() for m in matrices]
    return {which: [(i, m) for i, m in packed if holds(m.kind)] for which, holds in writer.shared.items()}


def _without_names(model: PreTrainedModel, chosen: Mapping[int, Sequence[Matrix]]) -> str:
    """A chosen matrix that no tensor of a stock checkpoint holds alone; empty if there is none."""
    for index, matrices in chosen.items():
        named = {name for name, _ in stored_matrices(model, index).values()}
        for matrix in matrices:
            if matrix.name not in named:
                return f"{matrix.name} of layer {index}"
    return ""


def _chosen(stage: Stage, model: PreTrainedModel) -> dict[int, list[Matrix]]:
    """The matrices that can be packed: routers are no linear maps, and stay plain numbers."""
    family = family_of(model.config)
    kinds: list[Kind] = [k for k in kinds_of(stage.parameters["where"], stage.parameters["spare"]) if k != "router"]
    return {i: layer_matrices(layer, family, kinds) for i, layer in enumerate(hf.decoder_layers(model))}


def group_sizes(stage: Stage, model: PreTrainedModel) -> dict[tuple[int, str], int]:
    """(layer, matrix) -> inputs that share a scale, 0 for a matrix that is left as it is.

    In a plain format, one number has to do for every matrix of a scheme.
    """
    if "group_size" not in stage.parameters:
        return {}
    wanted, format, chosen = stage.parameters["group_size"], format_of(stage, model), _chosen(stage, model)
    found = [(i, m) for i, matrices in chosen.items() for m in matrices]
    if "router" in kinds_of(stage.parameters["where"], stage.parameters["spare"]):
        layers = enumerate(hf.decoder_layers(model))
        found += [(i, m) for i, layer in layers for m in layer_matrices(layer, family_of(model.config), ["router"])]
    sizes = {(i, m.name): group_size_for([m.weight_BOI.shape[2]], wanted) for i, m in found}
    writer = _writer(format)
    for alike in _alike(chosen, writer).values() if wanted else ():
        common = group_size_for([m.weight_BOI.shape[2] for _, m in alike], wanted) if alike else 0
        sizes |= {(i, m.name): common for i, m in alike}
    return sizes


def _packing(stage: Stage, model: PreTrainedModel, sizes: Mapping[tuple[int, str], int]) -> Packing:
    """What is to be packed into a plain format."""
    chosen, family = _chosen(stage, model), family_of(model.config)
    packed = {matrix.name for found in chosen.values() for matrix in found}
    every = {matrix.name for layer in hf.decoder_layers(model) for matrix in layer_matrices(layer, family)}
    bits, whole_rows = int(stage.parameters["bits"]), not stage.parameters["group_size"]
    return Packing(
        bits=bits, whole_rows=whole_rows, matrices=chosen, group_sizes=sizes, others=frozenset(every - packed)
    )


def stored_form(
    format: str, stage: Stage, model: PreTrainedModel, sizes: Mapping[tuple[int, str], int], bits: Bits | None = None
) -> tuple[list[Edit], dict[str, Any]]:
    """(edits, config.json values) of a checkpoint that is stored in this format. bits: where they differ."""
    writer = _writer(format)
    if writer.layer is not None:
        return _rooms(stage, model, sizes, bits), {}
    return [], {} if writer.config is None else {QUANTIZATION: writer.config(_packing(stage, model, sizes))}


def _rooms(
    stage: Stage, model: PreTrainedModel, sizes: Mapping[tuple[int, str], int], bits: Bits | None = None
) -> list[Edit]:
    """The edits that make room for codes, layer by layer."""
    rooms = (_room(i, found, stage, sizes, bits) for i, found in _chosen(stage, model).items())
    return [edit for edit in rooms if edit is not None]


def _room(
    index: int, matrices: Sequence[Matrix], stage: Stage, sizes: Mapping[tuple[int, str], int], bits: Bits | None
) -> PackMatrices | None:
    packed = {m.name: sizes[index, m.name] for m in matrices if sizes[index, m.name]}
    counts = {m.name: len(m.weight_BOI) for m in matrices}
    if not packed:
        return None
    if bits is None:
        widths = {name: _expected(stage, counts[name]) for name in packed}
    else:
        widths = {name: tuple(bits[index][name]) for name in packed}
    return PackMatrices(index, widths, packed)


def _expected(stage: Stage, count: int) -> tuple[int, ...]:
    """Widths of so many matrices; of those that are still to be shared out, as many as add up to the budget."""
    if stage.parameters["bits"] != "auto":
        return (int(stage.parameters["bits"]),) * count
    budget = stage.parameters["budget"]
    low = max(bits for bits in BITS if bits <= budget)
    high = min(bits for bits in BITS if bits >= budget)
    wide = round(count * (budget - low) / max(high - low, 1))
    return (high,) * wide + (low,) * (count - wide)


def nearest_bits(options: Mapping[str, Any]) -> int:
    """The width for which scales are searched: that of all weights, or the one nearest to the budget."""
    wanted = float(options["budget"] if options["bits"] == "auto" else options["bits"])
    return min(BITS, key=lambda bits: abs(bits - wanted))


def pack_skeleton(stage: Stage, model: PreTrainedModel) -> list[Edit]:
    """Make room for codes in a skeleton; returns the edits that an edited checkpoint will carry."""
    format = format_of(stage, model)
    if format == DENSE:
        return []
    edits = _rooms(stage, model, group_sizes(stage, model))
    apply_edits(model, edits)
    return edits if _writer(format).layer is not None else []
