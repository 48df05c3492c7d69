"""Skip: the weak experts of a token are left out while the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import Edit, Plan, SkipExperts
from moe_compress.methods.registry import method
from moe_compress.models.shape import ModelShape

# A token's gates add up to the same for all tokens, up to this relative deviation, where they are renormalised.
SAME_TOTAL = 1e-3


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
    exclusive=(("share", "beta"),),
    shown_in_names=("share", "beta"),
)
def skip(model: ModelStatistics, *, share: float | None = 0.5, beta: float | None = None) -> Plan:
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


def _renormalised(layer: LayerStatistics) -> bool:
    """Whether a token's gates add up to the same number for all tokens."""
    mean = layer.sums["total"] / layer.sums["tokens"]
    variance = layer.sums["total_square"] / layer.sums["tokens"] - mean**2
    return bool(variance.clamp_min(0).sqrt() < SAME_TOTAL * mean.abs())
