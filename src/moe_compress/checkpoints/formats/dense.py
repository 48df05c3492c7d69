"""Plain numbers, as most checkpoints are published; quantized weights are as large as before."""

from __future__ import annotations

from moe_compress.checkpoints.formats.registry import Format, Loaders, Writer, storage_format


@storage_format("dense", fallback=2)
def dense() -> Format:
    """The weights that codes stand for, in the dtype that they were stored in."""
    return Format(loaders=Loaders(), writer=Writer())
