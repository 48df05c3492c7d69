"""Structured pruning inside experts: whole inner neurons (channels) go, with their rows of gate and up and their column
of down. Experts really become narrower, smaller and faster. E experts, F neurons, D model width.

Neurons are ranked within each expert, so that all experts of a layer keep equally many, or within the whole layer,
where experts get widths of their own; the widths of layers may differ too (budget=global).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import KeepChannels, Plan
from moe_compress.methods.allocation import Ladder, Taken, allocate, by_threshold
from moe_compress.methods.registry import Need, method
from moe_compress.models.shape import ModelShape, MoEShape

Score = Literal["camera", "heapr", "wanda", "magnitude"]
Budget = Literal["layer", "global"]
Within = Literal["expert", "layer"]
NEEDS: dict[str, Need] = {"magnitude": "nothing", "heapr": "gradients"}


def _needs(parameters: Mapping[str, Any]) -> Need:
    return NEEDS.get(parameters["score"], "channels")


def check(
    shape: ModelShape,
    *,
    keep: int | None,
    ratio: float | None,
    budget: Budget,
    within: Within,
    multiple: int,
    alpha: float,
    **_: Any,
) -> Plan:
    """Whether such widths are possible: a plan with the right ones, uneven where the real one may be."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the weight of the largest square is from 0 to 1.")
    even = _even(shape.moe, keep, ratio, multiple)
    made_up = {
        moe.layer: torch.arange(1.0, moe.num_experts + 1).mul(n + 1).unsqueeze(1).expand(-1, moe.inner // multiple)
        for n, moe in enumerate(shape.moe)
    }
    found = _widths(shape.moe, made_up, even, budget, within, multiple)
    return Plan([_edit(layer, widths_E) for layer, widths_E in found.items()], {}, {})


def _even(shapes: Sequence[MoEShape], keep: int | None, ratio: float | None, multiple: int) -> Taken:
    """Steps of `multiple` neurons that every layer takes alike."""
    if keep is None and (ratio is None or not 0 <= ratio < 1):
        raise ValueError(f"channels.ratio={ratio}: the fraction of neurons removed is in [0, 1).")
    steps: Taken = {}
    for shape in shapes:
        if multiple < 1 or shape.inner % multiple:
            raise ValueError(f"multiple={multiple} does not divide the {shape.inner} neurons of layer {shape.layer}.")
        left = keep if keep is not None else round(shape.inner * (1 - (ratio or 0)) / multiple) * multiple
        if keep is None and not left:
            most = 1 - multiple / shape.inner
            raise ValueError(
                f"channels.ratio={ratio}: of the {shape.inner} neurons of layer {shape.layer} none would be left, in "
                f"steps of {multiple}; at most {most:.4g} can go."
            )
        if not 0 < left <= shape.inner or left % multiple:
            raise ValueError(f"keep={left}: layer {shape.layer} can keep multiples of {multiple} up to {shape.inner}.")
        steps[shape.layer] = (shape.inner - left) // multiple
    if not any(steps.values()):
        _refuse_whole(max(shape.inner for shape in shapes), keep, ratio, multiple)
    return steps


def _refuse_whole(inner: int, keep: int | None, ratio: float | None, multiple: int) -> NoReturn:
    """Raise ValueError for words that leave every expert as wide as it is."""
    said = f"keep={keep}" if keep is not None else f"ratio={ratio}"
    least = f"keep fewer, or say at least ratio={multiple / inner:.4g}"
    raise ValueError(
        f"channels {said} would leave every expert all of its {inner} neurons, in steps of {multiple}: "
        f"{least if multiple < inner else 'use a smaller multiple='}."
    )


def _widths(
    shapes: Sequence[MoEShape],
    costs: Mapping[int, Tensor],
    even: Taken,
    budget: Budget,
    within: Within,
    multiple: int,
) -> dict[int, list[int]]:
    """How many neurons each expert keeps, by layer [E]. costs[layer]: of each next `multiple` of every expert."""
    if within == "expert":
        ladders = {layer: Ladder(tuple(cost_ES.sum(0)[:-1].tolist()), multiple) for layer, cost_ES in costs.items()}
        taken, _ = allocate(ladders, even, budget)
        return {moe.layer: [moe.inner - taken[moe.layer] * multiple] * moe.num_experts for moe in shapes}
    pools = [list(shapes)] if budget == "global" else [[moe] for moe in shapes]
    found: dict[int, list[int]] = {}
    for pool in pools:
        places = [(moe, e) for moe in pool for e in range(moe.num_experts)]
        steps = {n: Ladder(tuple(costs[moe.layer][e][:-1].tolist()), multiple) for n, (moe, e) in enumerate(places)}
        gone = by_threshold(steps, sum(even[moe.layer] * moe.num_experts for moe in pool) * multiple)
        for n, (moe, _e) in enumerate(places):
            found.setdefault(moe.layer, []).append(moe.inner - gone[n] * multiple)
    return found


def _edit(layer: int, widths_E: list[int], ranked_EF: Tensor | None = None) -> KeepChannels:
    """The edit that keeps the last so many neurons of each expert's ranking."""
    most = max(widths_E)
    uneven = None if min(widths_E) == most else tuple(widths_E)
    if ranked_EF is None:
        return KeepChannels(layer, most, uneven)
    kept_EW = torch.zeros(len(widths_E), most, dtype=torch.int32)
    for e, width in enumerate(widths_E):
        kept_EW[e, :width] = ranked_EF[e, ranked_EF.shape[1] - width :].sort().values
    return KeepChannels(layer, most, uneven, arrays={"channels": kept_EW})


@method(
    "model",
    group="slimming",
    paper="CAMERA (arXiv 2508.02322), HEAPr (2509.22299)",
    needs=_needs,
    check=check,
    breaks_patterns=True,
    exclusive=(("keep", "ratio"),),
    shown_in_names=("score", "keep", "ratio"),
    goes_with={"alpha": "score=camera"},
)
def channels(
    model: ModelStatistics,
    *,
    score: Score = "camera",
    keep: int | None = None,
    ratio: float | None = 0.25,
    budget: Budget = "layer",
    within: Within = "expert",
    multiple: int = 8,
    alpha: float = 0.5,
) -> Plan:
    """Make experts narrower: keep the inner neurons that matter most, in whole multiples."""
    ranked: dict[int, Tensor] = {}
    costs: dict[int, Tensor] = {}
    unseen: dict[int, list[int]] = {}
    for layer in model.layers:
        rising = channel_scores(layer, score, alpha).sort(dim=1)
        ranked[layer.shape.layer] = rising.indices
        costs[layer.shape.layer] = _comparable(rising.values, score, layer).unflatten(1, (-1, multiple)).sum(2)
        idle = (rising.values <= 0).all(1).nonzero().flatten().tolist() if score != "magnitude" else []
        unseen |= {layer.shape.layer: idle} if idle else {}
    shapes = [layer.shape for layer in model.layers]
    found = _widths(shapes, costs, _even(shapes, keep, ratio, multiple), budget, within, multiple)
    edits: list[Any] = [_edit(layer, widths_E, ranked[layer]) for layer, widths_E in found.items()]
    return Plan(edits, {}, {"widths": {edit.layer: edit.widths or edit.width for edit in edits}, "unseen": unseen})


def _comparable(score_EF: Tensor, score: Score, layer: LayerStatistics) -> Tensor:
    """Scores on one scale for all layers: squares over the stream's energy, or shares of the layer's weights."""
    if score == "magnitude":
        return score_EF / score_EF.mean()
    return (score_EF.square() if score == "wanda" else score_EF) / float(layer.sums.get("energy", 1.0))


def channel_scores(layer: LayerStatistics, score: Score, alpha: float) -> Tensor:
    """What each neuron is worth, float64 [E, F].

    camera: |w|^2 ((1 - alpha) sum (g a)^2 + alpha max (g a)^2), w its column of the down projection, a its activation
    and g the gate; heapr: sum a^2 times w' M w, M from the loss's gradients (engine/backward.py); wanda: |w|_1
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
