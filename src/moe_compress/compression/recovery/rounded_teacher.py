"""A teacher in few bits: its experts and linear maps are packed as they are read, a layer at a time.

Nothing is written; what rounding costs the teacher is measured by its own divergence from the model that it was.
B matrices of a stack, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.edited_packed import packed_matrix
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.windows import Windows
from moe_compress.edits.apply import refuse_if_uneditable, shallow
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import Layers, StreamedLayers
from moe_compress.methods.quantization.grid import rtn
from moe_compress.methods.recovery.divergences import forward_kl
from moe_compress.methods.weight_method import group_size_for
from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.modeling import edit_layer
from moe_compress.models.modeling.bit_packing import pack
from moe_compress.models.modeling.packed_linear import is_packed
from moe_compress.models.sublayers import block_names
from moe_compress.utils.devices import free_memory
from moe_compress.utils.files import gigabytes

# Inputs that share a scale, at most.
GROUP = 128
# Windows of the calibration text on which the rounded teacher is compared with what it was.
COMPARED = 4


@torch.no_grad()
def rounded_model(checkpoint: Checkpoint, layers: StreamedLayers, bits: int) -> PreTrainedModel:
    """The checkpoint's model with the matrices of its layers, but the routers, in `bits` bits, rounded to the nearest.

    Raises ValueError for one that is packed already, has experts that cannot be changed, or does not fit.
    """
    refuse_if_uneditable(checkpoint.config)
    if is_packed(layers.model) or any(isinstance(entry, StoredWeight) for entry in checkpoint.tensors.values()):
        raise ValueError(f"teacher_bits={bits}: {checkpoint.name} is packed already; leave teacher_bits= out.")
    needed = rounded_bytes(checkpoint, bits)
    if needed > (free := free_memory(layers.device)):
        raise ValueError(
            f"teacher_bits={bits}: {checkpoint.name} takes {gigabytes(needed)} in so few bits, and "
            f"{gigabytes(free)} are free: use layerwise, or solver=ridge."
        )
    model = layers.model
    names, family = block_names(model), family_of(model.config)
    held = hf.decoder_layers(model)
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            kept = shallow(layer)
            _pack(kept, names, family, bits)
        held[index] = kept
    return model.eval().requires_grad_(False)


def rounded_bytes(checkpoint: Checkpoint, bits: int) -> int:
    """About what it takes in memory in so few bits."""
    return bits * (checkpoint.bytes // checkpoint.stored_dtype.itemsize) // 8


def _pack(layer: nn.Module, names: Mapping[str, Any], family: Family, bits: int) -> None:
    """Put codes in the place of a layer's matrices; those whose inputs no group divides stay as they are."""
    matrices = [matrix for matrix in layer_matrices(layer, family) if matrix.kind != "router"]
    sizes = {matrix.name: group_size_for([matrix.weight_BOI.shape[2]], GROUP) for matrix in matrices}
    some = [matrix for matrix in matrices if sizes[matrix.name]]
    found = {
        each.name: rtn(each.weight_BOI, bits, sizes[each.name], each.weight_BOI.dtype, clip="mse") for each in some
    }
    widths = {name: [bits] * len(codes_BOI) for name, (codes_BOI, _) in found.items()}
    edit_layer.pack_matrices(layer, names, bits=widths, spans={name: sizes[name] for name in found})
    for name, (codes_BOI, scale_BOG) in found.items():
        for number, (codes_OI, scale_OG) in enumerate(zip(codes_BOI, scale_BOG, strict=True)):
            module = packed_matrix(layer, names, name, number)
            module.words = nn.Parameter(pack(codes_OI, bits), requires_grad=False)
            module.scales = nn.Parameter(scale_OG.clone(), requires_grad=False)


@torch.no_grad()
def rounding_kl(original: Layers, rounded: Layers, windows: Windows) -> float:
    """KL(original || rounded) of next tokens in nats a token, on a few windows that are spread over the text."""
    chosen = torch.linspace(0, len(windows) - 1, min(COMPARED, len(windows))).long()
    some = windows.select(chosen)
    (_, whole_NSD), (_, rounded_NSD) = (forward_layers(layers, some) for layers in (original, rounded))
    total, where_P2 = 0.0, some.predictions()
    for part_P2 in where_P2.split(hf.head_rows(original.model)):
        n, s = part_P2.unbind(1)
        said_PV, rounded_PV = hf.head(original.model, whole_NSD[n, s]), hf.head(rounded.model, rounded_NSD[n, s])
        total += float(forward_kl(rounded_PV, said_PV).double().sum())
    return total / max(1, len(where_P2))
