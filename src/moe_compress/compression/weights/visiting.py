"""How a stage that changes weights comes by every layer: with the calibration text, or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import Progress, walk_layers
from moe_compress.engine.layers import StreamedLayers


class Visitor(Protocol):
    """What becomes of a layer."""

    @property
    def visit(self) -> Callable[..., None]:
        """`visit(index, layer, *runs)`: observe, change, write and go on; no run where no text is read."""

    def is_done(self, index: int) -> bool:
        """Whether an earlier, killed run has finished this layer."""


def visit_layers(
    visitor: Visitor,
    source: Checkpoint,
    layers: StreamedLayers,
    writer: CheckpointWriter,
    windows: Windows | None,
    *,
    streams: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Visit every layer, what lies outside of them written first; what is reported of the calibration."""
    if not writer.has(None):
        writer.copy(None)
    if windows is not None:
        walk_layers(layers, windows, visitor.visit, streams=streams, state=writer.scratch, progress=progress)
        # What it cost is the writing's: the two cannot be told apart here.
        return {"calibration": {**windows.description, "seconds": 0.0, "peak_bytes": 0}}
    for index in range(source.num_layers):
        if not visitor.is_done(index):
            with layers.layer(index) as layer:
                visitor.visit(index, layer)
        if progress is not None:
            progress(index + 1, source.num_layers)
    return {}
