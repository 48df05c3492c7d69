"""What experts multiply, and the nearest low rank to it, computed the slow way: float64, one token at a time.

Rows are those of naive_pruning.py. A Gram matrix is the sum of g^2 x x' over an expert's tokens, g its gate; where the
gate scales the input (Llama-4), x has met it already. A matrix is [out, in], as in y = W x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.naive_pruning import Rows


def gram(rows: Rows, down: bool, family: str, width: int) -> Tensor:
    """The sum over what one expert's matrix multiplies."""
    found = torch.zeros(width, width, dtype=torch.float64)
    for x, gate in zip(rows.inner if down else rows.inputs, rows.gates, strict=True):
        seen = x.double() * (1 if family == "llama4_text" else gate)
        found += torch.outer(seen, seen)
    return found


def grams(experts: Sequence[Rows], down: bool, family: str, width: int) -> Tensor:
    """Of every expert of a layer, [E, width, width]."""
    return torch.stack([gram(rows, down, family, width) for rows in experts])


def distance(error: Tensor, gram: Tensor) -> float:
    """tr(D H D')."""
    return float((error.double() @ gram.double() * error.double()).sum())


def whitened(weight: Tensor, found: Tensor, grams: Tensor) -> float:
    """The error of all experts, as a share of what their matrices are."""
    pairs = list(zip(weight, found, grams, strict=True))
    return sum(distance(w - f, h) for w, f, h in pairs) / sum(distance(w, h) for w, _, h in pairs)


def nearest(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The matrix of that rank with the least tr(D H D'): W H^1/2 cut off behind its largest singular values."""
    value, vector = torch.linalg.eigh(gram.double())
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.pinv(root)
