"""The `gguf` package, an optional extra: its tables of types and names, and its writer."""

from __future__ import annotations

import importlib
from types import ModuleType


def gguf_library() -> ModuleType:
    """The package. ValueError, with what to install, where it is missing."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("GGUF files need the package gguf: pip install gguf.") from error
