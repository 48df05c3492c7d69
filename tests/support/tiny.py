"""Tiny random models, one per family, small enough that every test can run on every one of them."""

from __future__ import annotations

import torch

from moe_compress.data.windows import Windows
from tiny_families import (
    CONFIGS,
    EDITABLE,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    NO_EXPERT_EDITS,
    TOP_K,
    VOCAB,
    make,
    save,
    token_ids,
)

__all__ = [
    "CONFIGS",
    "CPU",
    "EDITABLE",
    "EXPERTS",
    "HIDDEN",
    "INNER",
    "LAYERS",
    "NO_EXPERT_EDITS",
    "TOP_K",
    "VOCAB",
    "make",
    "save",
    "token_ids",
    "windows_of",
]
CPU = torch.device("cpu")


def windows_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Windows:
    """Token windows of one text, a document each."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    number = torch.arange(len(ids))
    return Windows(ids, mask, number[:, None].expand_as(ids), torch.zeros_like(number), ("text",), "test", {})
