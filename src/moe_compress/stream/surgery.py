"""Surgery: a new checkpoint from edits alone. No forward, no calibration; untouched layers are copied as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.writer import CheckpointWriter
from moe_compress.model import hf
from moe_compress.model.applying import apply_edit
from moe_compress.model.edits import Edit
from moe_compress.model.sublayers import block_names
from moe_compress.stream.fold import Progress, StreamedLayers


def edits_by_layer(edits: Sequence[Edit], count: int) -> dict[int, list[Edit]]:
    """The layers of the source that are left, each with its edits in order, all by the source's numbers."""
    left: list[tuple[int, list[Edit]]] = [(index, []) for index in range(count)]
    for edit in edits:
        if edit.edit == "drop_layer":
            left.pop(edit.layer)
        else:
            index, found = left[edit.layer]
            found.append(dataclasses.replace(edit, layer=index))
    return dict(left)


def rewrite(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    writer: CheckpointWriter,
    *,
    fill: Mapping[str, Tensor] | None = None,
    through_model: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write every layer that is left: edited ones through the model, the others byte for byte.

    `fill`: tensors that the new model has on top, by module name in the new numbering; `through_model` takes every
    layer through the model's own parameters, as a method that changes weights does. Layers that are already
    written are left alone.
    """
    if not writer.has(None):
        writer.copy(None)
    by_layer = edits_by_layer(edits, checkpoint.num_layers)
    layers: StreamedLayers | None = None
    names: dict[str, object] = {}
    for place, (index, found) in enumerate(by_layer.items()):
        added = {hf.renumbered(n, index): t for n, t in (fill or {}).items() if hf.layer_of(n) == place}
        if not writer.has(index):
            if not found and not added and not through_model:
                writer.copy(index)
            else:
                if layers is None:
                    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
                    names = block_names(layers.model) if edits else {}
                with layers.layer(index):
                    for edit in found:
                        apply_edit(layers.model, names, edit)
                    state = {**hf.layer_state(layers.model, index), **added}
                    writer.write(index, hf.checkpoint_tensors(layers.model, state))
        if progress is not None:
            progress(place + 1, len(by_layer))
