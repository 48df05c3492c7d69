"""The identity recipe: every layer through the model and back, nothing changed. It shows that the engine is exact."""

from __future__ import annotations

from moe_compress.methods.registry import method


@method("layer", group="checks", paper="none")
def identity() -> None:
    """Read every layer into the model and write it back under its own names, unchanged."""
