"""Packed matrices as modules of their own, in an edited checkpoint: any width for any matrix, in every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moe_compress.checkpoints.formats.registry import (
    Format,
    LayerToStore,
    Loaders,
    PackedStack,
    Writer,
    storage_format,
)
from moe_compress.models.modeling.bit_packing import pack
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.modeling.unfused_experts import places, stack_path


def packed_matrix(layer: nn.Module, names: Mapping[str, Any], name: str, number: int) -> PackedMatrix:
    """One packed matrix of a layer by the name of its stack."""
    found = matrix_module(layer, names, name, number)
    assert isinstance(found, PackedMatrix)
    return found


def matrix_module(layer: nn.Module, names: Mapping[str, Any], name: str, number: int) -> nn.Module:
    """What holds one matrix of a layer that is held by itself."""
    path = stack_path(names.get("experts", ""), name)
    holder, child = places(layer.get_submodule(names["experts"]), path)[number] if path else (layer, name)
    return holder.get_submodule(child)


def _layer(stored: LayerToStore) -> dict[str, Tensor]:
    """The tensors of the layer as the edit makes it, codes and scales filled in."""
    # Only here: the table of formats does without transformers.
    from moe_compress.edits.apply import shallow
    from moe_compress.models import hf
    from moe_compress.models.modeling import edit_layer
    from moe_compress.models.sublayers import block_names

    names, packed = block_names(stored.model), shallow(stored.layer)
    bits = {name: tuple(found.bits) for name, found in stored.packed.items()}
    spans = {name: found.codes.shape[2] // found.scale.shape[2] for name, found in stored.packed.items()}
    edit_layer.pack_matrices(packed, names, bits=bits, spans=spans)
    for name, found in stored.packed.items():
        _fill(packed, names, name, found)
    prefix = f"{hf.layers_prefix(stored.model)}{stored.index}."
    state = {prefix + name: tensor for name, tensor in packed.state_dict().items()}
    return hf.checkpoint_tensors(stored.model, state)


def _fill(layer: nn.Module, names: Mapping[str, Any], name: str, found: PackedStack) -> None:
    for b, bits in enumerate(found.bits):
        module = packed_matrix(layer, names, name, b)
        module.words.copy_(pack(found.codes[b], bits))
        module.scales = nn.Parameter(found.scale[b].contiguous(), requires_grad=False)


@storage_format("packed", fallback=1)
def packed() -> Format:
    """Words and scales of `PackedMatrix`; the edits of config.json say what is packed, and how."""
    return Format(loaders=Loaders(), writer=Writer(layer=_layer))
