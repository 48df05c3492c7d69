"""Fewer active experts: a smaller top-k, the same or different in every layer, and weak experts skipped at run time.

These change what is computed per token, not what is stored. E experts, K experts per token, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.methods.trimming.allocation import cheapest
from moe_compress.methods.trimming.kept_sets import Layer
from moe_compress.model.edits import Edit, Plan, SetTopK, SkipExperts
from moe_compress.model.shapes import ModelShape
from moe_compress.registry import Need, method
from moe_compress.stream.observed import LayerSums, Observed

# A token's gates add up to the same for all tokens, up to this relative deviation, where they are renormalised.
SAME_TOTAL = 1e-3


def _needs(parameters: Mapping[str, Any]) -> Need:
    if parameters["mean"] is None:
        return "nothing"
    return "noise" if parameters["on"] == "noise" else "probe"


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
    if mean is None or not math.isfinite(mean):
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
    rivals=(("k", "mean"),),
    headline=("k", "mean"),
)
def top_k(
    model: Observed, *, k: int | None = 1, mean: float | None = None, on: Literal["text", "noise"] = "text"
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


def _losses(layer: LayerSums) -> list[float]:
    """Relative squared change of the routed output with 1, 2, ... top_k experts active."""
    probe, found = layer.probe(), []
    for active in range(1, layer.shape.top_k + 1):
        rule = None if probe.routing is None else replace(probe.routing, top_k=active)
        rebuilt = Layer(replace(probe, routing=rule), layer.shape.layer)
        everyone = torch.ones(1, rebuilt.experts, dtype=torch.bool)
        found.append(float(rebuilt.relative(rebuilt.losses(everyone)[0])) ** 2)
    return found


# --- skipping -----------------------------------------------------------------------------------------------


def check_skip(shape: ModelShape, *, share: float | None, beta: float | None, **_: Any) -> Plan:
    """Whether anything can be skipped: a plan with arbitrary thresholds."""
    for moe in shape.moe:
        if moe.novices:
            raise ValueError(
                f"layer {moe.layer} holds constants in place of experts: let skip come before novice=mean."
            )
        if moe.top_k < 2:
            raise ValueError(f"layer {moe.layer} uses {moe.top_k} expert per token: there is none to skip.")
    for name, value in (("share", share), ("beta", beta)):
        if value is not None and not 0 < value < 1:
            raise ValueError(f"skip.{name}={value}: a fraction between 0 and 1 is needed.")
    edits: list[Edit] = [SkipExperts(moe.layer, 0.5, renormalise=True) for moe in shape.moe]
    return Plan(edits, {}, {})


@method(
    "model",
    group="trimming",
    paper="NAEE (arXiv 2402.14800)",
    needs="text",
    check=check_skip,
    rivals=(("share", "beta"),),
    headline=("share", "beta"),
)
def skip(model: Observed, *, share: float | None = 0.5, beta: float | None = None) -> Plan:
    """Skip, at run time, a token's experts whose gate is small beside its largest.

    share: the fraction of all but each token's first expert that is skipped on the calibration text (the paper:
    half, so that its threshold is the median of g2/g1); or beta: one threshold on that ratio for every layer.
    The gates that remain are scaled up again where the model's gates always add up to the same.
    """
    edits: list[Edit] = []
    report: dict[int, dict[str, float]] = {}
    for layer in model.layers:
        threshold = beta if beta is not None else _threshold(layer.sums["ratio"], layer.sums["tokens"], share or 0.5)
        active = _active(layer.sums["ratio"], layer.sums["tokens"], threshold)
        edits.append(SkipExperts(layer.shape.layer, threshold, _renormalised(layer), active=active))
        report[layer.shape.layer] = {"threshold": threshold, "experts_per_token": active}
    return Plan(edits, {}, {"skipping": report})


def _others(ratio_N: Tensor, tokens: Tensor) -> Tensor:
    """The histogram of gate ratios without each token's largest gate, whose ratio is one."""
    others_N = ratio_N.clone()
    others_N[-1] -= tokens
    return others_N.clamp_min(0)


def _threshold(ratio_N: Tensor, tokens: Tensor, share: float) -> float:
    """The ratio below which `share` of the other gates lie, to the width of a bin."""
    below_N = _others(ratio_N, tokens).cumsum(0)
    edge = int(torch.searchsorted(below_N, share * below_N[-1]))
    return (edge + 1) / len(ratio_N)


def _active(ratio_N: Tensor, tokens: Tensor, threshold: float) -> float:
    """Experts that a token uses on average once ratios below the threshold are skipped."""
    others_N = _others(ratio_N, tokens)
    first = round(threshold * len(ratio_N))
    return 1 + float(others_N[first:].sum() / tokens)


def _renormalised(layer: LayerSums) -> bool:
    """Whether a token's gates add up to the same number for all tokens."""
    mean = layer.sums["total"] / layer.sums["tokens"]
    variance = layer.sums["total_square"] / layer.sums["tokens"] - mean**2
    return bool(variance.clamp_min(0).sqrt() < SAME_TOTAL * mean.abs())
