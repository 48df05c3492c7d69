"""Surgery: a new checkpoint from edits alone. No forward, no calibration; untouched layers are copied as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.stored_weight import StackedWeight, StoredWeight
from moe_compress.checkpoints.partly_packed import NEW_NUMBERS
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.edits.apply import apply_edit, edits_by_layer
from moe_compress.edits.dense_form import dense_name
from moe_compress.edits.edits import Edit, KeepExperts
from moe_compress.engine.forward import Progress
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.matrices import stored_matrices
from moe_compress.models.sublayers import block_names


def rewrite(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    writer: CheckpointWriter,
    *,
    fill: Mapping[str, Tensor] | None = None,
    dense: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> None:
    """Write every layer that is left: edited ones through the model, the others byte for byte.

    `fill`: tensors that the new model has on top, by module name in the new numbering; `dense`: a skeleton of what is
    written, where that has no experts. Layers that are already written are left alone.
    """
    if dense is not None:
        hf.remember_names(dense, checkpoint.tensors)
    if not writer.has(None):
        writer.copy(None)
    by_layer = edits_by_layer(edits, checkpoint.num_layers)
    layers: StreamedLayers | None = None
    names: dict[str, Any] = {}
    for place, (index, found) in enumerate(by_layer.items()):
        added = {hf.renumbered(n, index): t for n, t in (fill or {}).items() if hf.layer_of(n) == place}
        if not writer.has(index):
            if not found and not added:
                writer.copy(index)
            else:
                if layers is None:
                    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
                    names = block_names(layers.model) if edits else {}
                with layers.layer(index):
                    writer.write(index, _edited(checkpoint, layers.model, index, names, found, added, dense))
        if progress is not None:
            progress(place + 1, len(by_layer))


def _edited(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    index: int,
    names: Mapping[str, Any],
    edits: Sequence[Edit],
    added: Mapping[str, Tensor],
    dense: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """The tensors of a layer after its edits; what was packed stays so, unless it has new numbers."""
    packed = any(isinstance(checkpoint.tensors[key], StoredWeight) for key in checkpoint.keys(index))
    before = stored_matrices(model, index) if packed else {}
    for edit in edits:
        apply_edit(model, names, edit)
    if dense is not None:
        state = {dense_name(n, names["block"], model): each for n, each in hf.layer_state(model, index).items()}
        return hf.checkpoint_tensors(dense, state)
    tensors: dict[str, Any] = hf.checkpoint_tensors(model, {**hf.layer_state(model, index), **added})
    if packed:
        tensors |= _still_packed(checkpoint, model, index, names, before, edits)
        tensors |= _still_stacked(checkpoint, [key for key in checkpoint.keys(index) if key in tensors], edits)
    return tensors


def _still_packed(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    index: int,
    names: Mapping[str, Any],
    before: Mapping[str, tuple[str, int]],
    edits: Sequence[Edit],
) -> dict[str, StoredWeight]:
    """What is packed in the source and left after the edits, by its new name: the same bytes, never quantized again."""
    entries = {place: checkpoint.tensors.get(key) for key, place in before.items()}
    new = any(edit.edit in NEW_NUMBERS for edit in edits)
    found: dict[str, StoredWeight] = {}
    for key, (name, number) in stored_matrices(model, index).items():
        if name.rpartition(".")[0] == names.get("experts"):
            if new:
                continue
            number = _number_before(edits, number)
        entry = entries.get((name, number))
        if isinstance(entry, StoredWeight):
            found[key] = entry
    return found


def _still_stacked(checkpoint: Checkpoint, keys: Sequence[str], edits: Sequence[Edit]) -> dict[str, Any]:
    """The same of experts that are packed in one stack: those that are left of it."""
    cuts = [edit for edit in edits if isinstance(edit, KeepExperts)]
    new = any(edit.edit in NEW_NUMBERS for edit in edits)
    stacks = [] if new else [key for key in keys if isinstance(checkpoint.tensors[key], StackedWeight)]
    if not cuts or not stacks:
        return {key: checkpoint.tensors[key] for key in stacks}
    left = [_number_before(cuts, number) for number in range(len(cuts[-1].experts))]
    with checkpoint.read(stacks) as tensors:
        return {key: stack.experts(left) for key, stack in tensors.items()}


def _number_before(edits: Sequence[Edit], number: int) -> int:
    """Which expert of the source an expert that is left was."""
    for edit in reversed(edits):
        if isinstance(edit, KeepExperts):
            number = edit.experts[number]
    return number
