"""Experts that must stay: named ones, or the few with massive activations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.edits.edits import KeepExperts
from moe_compress.methods.expert_drop import scores
from moe_compress.models.shape import MoEShape

PROTECTED = re.compile(r"(\d+):(\d+)")
Protected = Mapping[int, Sequence[int]]


def super_experts(layers: Sequence[LayerStatistics]) -> dict[int, list[int]]:
    """Experts with massive activations, by layer."""
    maxima = {layer.shape.layer: layer.sums["max"] for layer in layers}
    return scores.super_experts(maxima, layers[0].total_layers)


def put_last(ranked: Mapping[int, Tensor], protected: Protected) -> None:
    """Let the protected experts outrank all others."""
    for index, ids in protected.items():
        ranked[index][list(ids)] = torch.inf


def parsed(text: str, shapes: Sequence[MoEShape]) -> dict[int, list[int]]:
    """`0:3,2:7` -> experts by layer; ValueError for what is not there."""
    if text == "none":
        return {}
    found: dict[int, list[int]] = {}
    counts = {shape.layer: shape.num_experts for shape in shapes}
    for word in text.split(","):
        match = PROTECTED.fullmatch(word.strip())
        if match is None:
            raise ValueError(f"expert_drop.protect={text}: `super`, `none` or a list such as 0:3,2:7 (layer:expert).")
        index, expert = int(match.group(1)), int(match.group(2))
        if index not in counts:
            raise ValueError(f"expert_drop.protect={word}: layer {index} has no experts; MoE layers: {list(counts)}.")
        if expert >= counts[index]:
            raise ValueError(f"expert_drop.protect={word}: layer {index} has experts 0 to {counts[index] - 1}.")
        if expert in found.get(index, ()):
            raise ValueError(f"expert_drop.protect={text}: {word.strip()} is there twice.")
        found.setdefault(index, []).append(expert)
    return found


def require(edits: Sequence[KeepExperts], protected: Protected) -> None:
    """Raise ValueError if a protected expert would go after all."""
    for edit in edits:
        lost = sorted(set(protected.get(edit.layer, ())) - set(edit.experts))
        if lost:
            raise ValueError(
                f"layer {edit.layer} cannot keep only {len(edit.experts)} experts and spare the protected {lost}: "
                "keep more, or protect fewer."
            )
