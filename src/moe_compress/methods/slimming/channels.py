"""Structured pruning inside experts: whole inner neurons (channels) go, with their rows of gate and up and their column
of down. Experts really become narrower, smaller and faster. E experts, F neurons, D model width.

All experts of a layer keep equally many neurons, each its own best; the widths of layers may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.methods.trimming.allocation import Ladder, Taken, allocate
from moe_compress.model.edits import KeepChannels, Plan
from moe_compress.model.moe import MoEShape
from moe_compress.model.shapes import ModelShape
from moe_compress.registry import Need, method
from moe_compress.stream.observed import LayerSums, Observed

Score = Literal["camera", "heapr", "wanda", "magnitude"]
NEEDS: dict[str, Need] = {"magnitude": "nothing", "heapr": "gradients"}


def _needs(parameters: Mapping[str, Any]) -> Need:
    return NEEDS.get(parameters["score"], "channels")


def check(
    shape: ModelShape,
    *,
    keep: int | None,
    ratio: float | None,
    budget: Literal["layer", "global"],
    multiple: int,
    alpha: float,
    **_: Any,
) -> Plan:
    """Whether such widths are possible: a plan with the right ones, uneven where the real one may be."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the weight of the largest square is from 0 to 1.")
    even = _even(shape.moe, keep, ratio, multiple)
    ladders = {moe.layer: Ladder((1.0 + n,) * (moe.inner // multiple - 1), multiple) for n, moe in enumerate(shape.moe)}
    taken, _report = allocate(ladders, even, budget)
    return Plan([KeepChannels(moe.layer, moe.inner - taken[moe.layer] * multiple) for moe in shape.moe], {}, {})


def _even(shapes: Sequence[MoEShape], keep: int | None, ratio: float | None, multiple: int) -> Taken:
    """Steps of `multiple` neurons that every layer takes alike."""
    if keep is None and (ratio is None or not 0 <= ratio < 1):
        raise ValueError(f"channels.ratio={ratio}: the fraction of neurons removed is in [0, 1).")
    steps: Taken = {}
    for shape in shapes:
        if multiple < 1 or shape.inner % multiple:
            raise ValueError(f"multiple={multiple} does not divide the {shape.inner} neurons of layer {shape.layer}.")
        left = keep if keep is not None else max(1, round(shape.inner * (1 - (ratio or 0)) / multiple)) * multiple
        if not 0 < left <= shape.inner or left % multiple:
            raise ValueError(f"keep={left}: layer {shape.layer} can keep multiples of {multiple} up to {shape.inner}.")
        steps[shape.layer] = (shape.inner - left) // multiple
    return steps


@method(
    "model",
    group="slimming",
    paper="CAMERA (arXiv 2508.02322), HEAPr (2509.22299)",
    needs=_needs,
    check=check,
    rivals=(("keep", "ratio"),),
    headline=("score", "keep", "ratio"),
)
def channels(
    model: Observed,
    *,
    score: Score = "camera",
    keep: int | None = None,
    ratio: float | None = 0.25,
    budget: Literal["layer", "global"] = "layer",
    multiple: int = 8,
    alpha: float = 0.5,
) -> Plan:
    """Make experts narrower: keep the inner neurons that matter most, in whole multiples."""
    ranked: dict[int, Tensor] = {}
    ladders: dict[int, Ladder] = {}
    for layer in model.layers:
        score_EF = channel_scores(layer, score, alpha)
        rising = score_EF.sort(dim=1)
        ranked[layer.shape.layer] = rising.indices
        energy = float(layer.sums.get("energy", 1.0))
        costs = rising.values.unflatten(1, (-1, multiple)).sum((0, 2)) / energy
        ladders[layer.shape.layer] = Ladder(tuple(costs[:-1].tolist()), multiple)
    shapes = [layer.shape for layer in model.layers]
    taken, report = allocate(ladders, _even(shapes, keep, ratio, multiple), budget)
    edits: list[Any] = []
    for shape in shapes:
        kept_EW = ranked[shape.layer][:, taken[shape.layer] * multiple :].sort(dim=1).values
        edits.append(KeepChannels(shape.layer, kept_EW.shape[1], arrays={"channels": kept_EW.int()}))
    return Plan(edits, {}, {"widths": {edit.layer: edit.width for edit in edits}, **report})


def channel_scores(layer: LayerSums, score: Score, alpha: float) -> Tensor:
    """What each neuron is worth, float64 [E, F].

    camera: |w|^2 ((1 - alpha) sum (g a)^2 + alpha max (g a)^2), w its column of the down projection, a its activation
    and g the gate; heapr: sum a^2 times w' M w, M from the loss's gradients (stream/backward.py); wanda: |w|_1
    sqrt(sum a^2); magnitude: squares of all its weights.
    """
    if score == "heapr":
        return layer.sums["heapr"]
    with layer.view() as view:
        stacks = {name: stack_EOI.double().cpu() for name, stack_EOI in view.stacks().items()}
    down_EDF = stacks["down"]
    if score == "magnitude":
        rows = [stacks[name].square().sum(2) for name in ("gate", "up") if name in stacks]
        return torch.stack([*rows, down_EDF.square().sum(1)]).sum(0)
    if score == "wanda":
        return down_EDF.abs().sum(1) * layer.sums["channel_square"].sqrt()
    activity_EF = (1 - alpha) * layer.sums["channel_gated"] + alpha * layer.sums["channel_max"]
    return down_EDF.square().sum(1) * activity_EF
