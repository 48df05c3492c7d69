"""Runs of `factorise`, with what the method was given of each layer and what it made of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.edits.factors import Form
from moe_compress.methods import registry
from moe_compress.methods.factor_method import FactoredLayer, LayerExperts
from moe_compress.methods.factorisation.structures import STRUCTURES, Factors

__all__ = ["STRUCTURES", "Layer", "factorised", "numbers_of", "whitened"]


@dataclass
class Layer:
    """Copies of what one layer's experts were, what they multiplied, and their factors."""

    weights: dict[str, Tensor]
    grams: dict[str, Tensor | None]
    factors: Mapping[str, Factors]


def factorised(sentence: str, **options: Any) -> tuple[Path, dict[int, Layer]]:
    """The checkpoint, and its layers as the method saw them last."""
    seen: dict[int, Layer] = {}
    before = registry.find("factorise").implementation

    def watched(layer: LayerExperts, **own: Any) -> FactoredLayer:
        found = before.run(layer, **own)
        seen[layer.layer] = Layer(
            {part: weight.clone() for part, weight in layer.weights.items()},
            {
                part: None if grams is None else torch.stack([grams[e].clone() for e in range(len(grams))])
                for part, grams in layer.grams.items()
            },
            found.factors,
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.IMPLEMENTATIONS, "factorise", replace(before, run=watched))
        return moe_compress.compress(sentence, **options).folder, seen


def numbers_of(form: Form, part: str, experts: int, outputs: int, inputs: int) -> int:
    """What is stored of a projection in this form, straight from what its parts are."""
    if form.bases:
        count, width = form.bases
        return experts * outputs * width + count * width * inputs + experts * count
    if form.basis:
        shares_outputs = (part == "down") if form.side is None else form.side == "out"
        shared, own = (outputs, inputs) if shares_outputs else (inputs, outputs)
        return form.basis * shared + experts * form.basis * own
    ranks = form.rank if isinstance(form.rank, tuple) else (form.rank,) * experts
    core = outputs * inputs if form.core else 0
    return core + sum(ranks) * (outputs + inputs) + experts * outputs * form.residue


def whitened(layers: Mapping[int, Layer], grams: Mapping[int, Layer]) -> float:
    """The mean over layers and projections of the error as a share of the experts, in the metric of `grams`."""
    found = []
    for index, layer in layers.items():
        for part, weight in layer.weights.items():
            metric = grams[index].grams[part].double()
            error = weight.double() - layer.factors[part].dense().double()
            off, whole = (float((each @ metric * each).sum()) for each in (error, weight.double()))
            found.append(off / whole)
    return sum(found) / len(found)
