"""Fewer active experts: a smaller top-k, the same or different in every layer, and weak experts skipped at run time.

These change what is computed per token, not what is stored. E experts, K experts per token, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import Edit, Plan, SetTopK
from moe_compress.methods.allocation import cheapest
from moe_compress.methods.expert_drop.subset_loss import SubsetLoss
from moe_compress.methods.registry import Need, method
from moe_compress.models.shape import ModelShape


def _needs(parameters: Mapping[str, Any]) -> Need:
    if parameters["mean"] is None:
        return "nothing"
    return "noise" if parameters["on"] == "noise" else "outputs"


def check_top_k(shape: ModelShape, *, k: int | None, mean: float | None, **_: Any) -> Plan:
    """Whether so few can be active: a plan with the right mean."""
    if k is not None:
        return Plan(_uniform(shape, k), {}, {})
    counts, left = [], _total(shape, mean)
    for index, moe in enumerate(shape.moe):
        behind = len(shape.moe) - index - 1
        counts.append(min(moe.top_k, left - behind))
        left -= counts[-1]
    return Plan([SetTopK(moe.layer, count) for moe, count in zip(shape.moe, counts, strict=True)], {}, {})


def _uniform(shape: ModelShape, k: int) -> list[Edit]:
    for moe in shape.moe:
        if not 1 <= k < moe.top_k:
            raise ValueError(f"k={k}: layer {moe.layer} uses {moe.top_k} experts per token; k is less, but at least 1.")
    return [SetTopK(moe.layer, k) for moe in shape.moe]


def _total(shape: ModelShape, mean: float | None) -> int:
    """Active experts of all layers together."""
    if mean is None:
        raise ValueError("top_k needs k= or mean=: how many experts a token uses, such as k=1.")
    if not math.isfinite(mean):
        raise ValueError(f"mean={mean}: top_k needs k= or mean=, a number.")
    total, most = round(mean * len(shape.moe)), sum(moe.top_k for moe in shape.moe)
    if not len(shape.moe) <= total < most:
        raise ValueError(f"mean={mean}: on average 1 or more, but fewer than {most / len(shape.moe):g}, can be active.")
    return total


@method(
    "model",
    group="trimming",
    paper="LExI (arXiv 2509.02753)",
    needs=_needs,
    check=check_top_k,
    exclusive=(("k", "mean"),),
    shown_in_names=("k", "mean"),
    goes_with={"on": "mean!=none"},
)
def top_k(
    model: ModelStatistics, *, k: int | None = None, mean: float | None = None, on: Literal["text", "noise"] = "text"
) -> Plan:
    """Let each token use fewer experts.

    k: the same number in every layer, or mean: this many on average, where the routed output changes least: the
    sum over layers of its relative squared change is the smallest possible; on: measured on calibration text, or on
    standard normal inputs without any text (LExI).
    """
    if k is not None:
        return Plan(_uniform(model.shape, k), {}, {})
    total = _total(model.shape, mean)
    losses = {layer.shape.layer: _losses(layer) for layer in model.layers}
    # Entry c of a row is the loss with c experts active; none active is no choice.
    chosen = cheapest([[float("inf"), *found] for found in losses.values()], total)
    edits: list[Edit] = [
        SetTopK(layer.shape.layer, count)
        for layer, count in zip(model.layers, chosen, strict=True)
        if count != layer.shape.top_k
    ]
    return Plan(edits, {i: [*found] for i, found in losses.items()}, {"active": chosen, "measured_on": on})


def _losses(layer: LayerStatistics) -> list[float]:
    """Relative squared change of the routed output with 1, 2, ... top_k experts active."""
    sample, found = layer.output_sample(), []
    for active in range(1, layer.shape.top_k + 1):
        rule = None if sample.routing is None else replace(sample.routing, top_k=active)
        rebuilt = SubsetLoss(replace(sample, routing=rule), layer.shape.layer)
        everyone = torch.ones(1, rebuilt.experts, dtype=torch.bool)
        found.append(float(rebuilt.relative(rebuilt.losses(everyone)[0])) ** 2)
    return found
