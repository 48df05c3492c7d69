"""In which format a weight stage is stored, what then goes into config.json, and how many inputs share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.compressed_tensors import packed_values, scheme
from moe_compress.checkpoints.formats.gptq import gptq_values
from moe_compress.compression.weights.layer_stores import (
    CompressedTensorsStore,
    DenseStore,
    EditedPackedStore,
    GptqStore,
)
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import Edit, PackMatrices
from moe_compress.methods.quantization.grid import BITS
from moe_compress.methods.quantization.quantize import group_size_for
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, Matrix, kinds_of, layer_matrices, stored_matrices
from moe_compress.recipes.recipe import Stage

STORES: dict[str, type[DenseStore]] = {
    "dense": DenseStore,
    "compressed-tensors": CompressedTensorsStore,
    "gptq": GptqStore,
    "packed": EditedPackedStore,
}
Bits = Mapping[int, Mapping[str, Sequence[int]]]


def format_of(stage: Stage, model: PreTrainedModel) -> str:
    """dense, compressed-tensors, gptq or packed. Raises ValueError for one that the model's experts cannot have."""
    wanted = str(stage.parameters.get("format", "dense"))
    chosen = _chosen(stage, model)
    if wanted == "dense" or not any(chosen.values()):
        return "dense"
    if wanted == "packed":
        return wanted
    reason = _not_plain(stage, model, chosen, "compressed-tensors" if wanted == "auto" else wanted)
    if wanted == "auto":
        return "packed" if reason or stage.parameters["bits"] == "auto" else "compressed-tensors"
    if reason:
        raise ValueError(f"format={wanted} {reason}: use format=packed or format=dense.")
    return wanted


def _not_plain(stage: Stage, model: PreTrainedModel, chosen: Mapping[int, Sequence[Matrix]], format: str) -> str:
    """Why a plain format cannot hold these matrices; empty if it can."""
    lacking = _without_names(model, chosen)
    if lacking:
        return f"packs matrices one by one, but {model.config.model_type} stores {lacking} together with others"
    if format == "compressed-tensors" and not any(m.kind == "experts" for found in chosen.values() for m in found):
        return "is read by stock transformers only where experts are packed, too"
    for which, alike in _alike(chosen, format).items():
        if alike and not group_size_for([m.weight_BOI.shape[2] for _, m in alike], stage.parameters["group_size"]):
            return f"needs one group size for all of {which}, and no group of 8 and more divides all widths"
    return ""


def _alike(chosen: Mapping[int, Sequence[Matrix]], format: str) -> dict[str, list[tuple[int, Matrix]]]:
    """Matrices that one scheme is for: stock loaders know one for experts and one for the rest, GPTQ's one for all."""
    packed = [(i, m) for i, matrices in chosen.items() for m in matrices]
    if format == "gptq":
        return {"its matrices": packed}
    experts = [(i, m) for i, m in packed if m.kind == "experts"]
    return {"the experts": experts, "the other linear maps": [(i, m) for i, m in packed if m.kind != "experts"]}


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
    if format in ("dense", "packed") or not wanted:
        return sizes
    for alike in _alike(chosen, format).values():
        common = group_size_for([m.weight_BOI.shape[2] for _, m in alike], wanted) if alike else 0
        sizes |= {(i, m.name): common for i, m in alike}
    return sizes


def stored_form(
    format: str, stage: Stage, model: PreTrainedModel, sizes: Mapping[tuple[int, str], int], bits: Bits | None = None
) -> tuple[list[Edit], dict[str, Any]]:
    """(edits, config.json values) of a checkpoint that is stored in this format. bits: where they differ."""
    if format == "dense":
        return [], {}
    chosen = _chosen(stage, model)
    if format == "packed":
        return [edit for i, found in chosen.items() if (edit := _room(i, found, stage, sizes, bits)) is not None], {}
    if format == "gptq":
        return [], gptq_values(model, stage.parameters, {m.name for found in chosen.values() for m in found}, sizes)
    width, whole = int(stage.parameters["bits"]), not stage.parameters["group_size"]
    schemes: dict[bool, dict[str, Any]] = {}
    for index, matrices in chosen.items():
        for matrix in matrices:
            schemes[matrix.kind == "experts"] = scheme(width, sizes[index, matrix.name], whole)
    kinds = kinds_of(stage.parameters["where"], stage.parameters["spare"])
    return [], packed_values(model, [k for k in kinds if k != "router"], schemes.get(True), schemes.get(False))


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
    if format == "dense":
        return []
    edits, _ = stored_form("packed", stage, model, group_sizes(stage, model))
    apply_edits(model, edits)
    return edits if format == "packed" else []
