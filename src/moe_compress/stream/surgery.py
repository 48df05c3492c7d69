"""Surgery: a new checkpoint from edits alone. No forward, no calibration; untouched layers are copied as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.writer import CheckpointWriter
from moe_compress.model import edited, hf
from moe_compress.model.edits import Edit, block_names, to_json
from moe_compress.stream.fold import Progress, StreamedLayers


def rewrite(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    writer: CheckpointWriter,
    *,
    through_model: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write every layer: edited ones through the model, the others byte for byte.

    `through_model` takes every layer through the model's own parameters, as a method that changes weights does.
    Layers that are already written are left alone.
    """
    if not writer.has(None):
        writer.copy(None)
    by_layer = {edit.layer: edit for edit in edits}
    layers: StreamedLayers | None = None
    names: dict[str, str] = {}
    for index in range(checkpoint.num_layers):
        edit = by_layer.get(index)
        if not writer.has(index):
            if edit is None and not through_model:
                writer.copy(index)
            else:
                if layers is None:
                    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
                    names = block_names(layers.model) if edits else {}
                _rewrite_layer(layers, index, edit, names, writer)
        if progress is not None:
            progress(index + 1, checkpoint.num_layers)


def _rewrite_layer(
    layers: StreamedLayers, index: int, edit: Edit | None, names: dict[str, str], writer: CheckpointWriter
) -> None:
    with layers.layer(index) as layer:
        if edit is not None:
            edited.apply(layer, names, to_json(edit))
        state = hf.layer_state(layers.model, index)
        writer.write(index, hf.checkpoint_tensors(layers.model, state))
