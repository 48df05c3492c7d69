"""The identity rewrite: every layer through the model's own parameters and back, nothing changed. It shows that reading
and writing are exact.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression import surgery
from moe_compress.engine.layers import StreamedLayers


def rewritten(source: Checkpoint, out: Path) -> Checkpoint:
    """A checkpoint with the same tensors, one shard a layer."""
    writer = CheckpointWriter(out, source, "identity")
    layers = StreamedLayers(source, torch.device("cpu"), source.stored_dtype)
    writer.copy(None)
    for index in range(source.num_layers):
        with layers.layer(index):
            writer.write(index, surgery._edited(source, layers.model, index, {}, [], {}))
    writer.finish(source.values, {})
    return open_checkpoint(out)
