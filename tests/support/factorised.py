"""Runs of `factorise`, with what the method was given of each layer and what it made of that."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
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
from moe_compress.models.moe import MoEView, moe_views, permute_neurons
from support import readers, tiny

__all__ = ["STRUCTURES", "Layer", "factorised", "numbers_of", "permuted", "planted", "related", "runs", "unrelated"]


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


def runs(lab: Callable[[str], dict[str, object]], place: Path) -> Callable[..., tuple[Path, dict[int, Layer]]]:
    """(family, sentence, a model of one's own) -> the checkpoint, and its layers as the method saw them."""
    numbers = itertools.count()

    @functools.cache
    def of(family: str, sentence: str, model: str = "") -> tuple[Path, dict[int, Layer]]:
        given = {"model": model} if model else {}
        return factorised(sentence, **{**lab(family), "out": str(place / str(next(numbers))), **given})

    return of


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


@torch.no_grad()
def planted(folder: Path, fill: Callable[[MoEView, torch.Generator], None], family: str = "mixtral") -> Path:
    """A tiny reader whose experts were filled in by hand, layer by layer."""
    model = tiny.make(family, vocab_size=readers.VOCAB)
    for index, view in moe_views(model).items():
        fill(view, torch.Generator().manual_seed(index))
    tiny.save(model, folder)
    readers.tokenizer().save_pretrained(folder)
    return folder


def unrelated(view: MoEView, generator: torch.Generator) -> None:
    """Experts of rank 5 each, with nothing in common."""
    for stack in view.stacks().values():
        experts, outputs, inputs = stack.shape
        left = torch.randn(experts, outputs, 5, generator=generator)
        stack.copy_(left @ torch.randn(experts, 5, inputs, generator=generator) / 10)


def related(view: MoEView, generator: torch.Generator) -> None:
    """One matrix for all, and rank 3 of each expert's own."""
    for stack in view.stacks().values():
        experts, outputs, inputs = stack.shape
        core = torch.randn(outputs, inputs, generator=generator) / 5
        left = torch.randn(experts, outputs, 3, generator=generator)
        stack.copy_(core + left @ torch.randn(experts, 3, inputs, generator=generator) / 20)


def permuted(view: MoEView, generator: torch.Generator) -> None:
    """The same, each with its neurons in an order of its own."""
    related(view, generator)
    order = torch.rand(view.num_experts, max(view.widths), generator=generator).argsort(1)
    permute_neurons(view, order)
