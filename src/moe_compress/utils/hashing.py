"""Fingerprints of values and bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that identify `parts` (JSON values or bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bytes of a tensor, [n]; a view where it lies on the CPU in one piece."""
    dense = tensor.detach().cpu().contiguous()
    # A tensor of one element is contiguous whatever its stride, which then stands in the way of a view.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor, for hashing."""
    return flat_bytes(tensor).numpy().tobytes()
