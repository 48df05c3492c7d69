"""Densify: every MoE layer becomes one dense MLP of its best experts, each with a fixed gate in place of a router.

With fixed gates p_e, sum_e p_e D_e phi(G_e x, U_e x) is exactly an MLP with all neurons side by side whose down
projections are p_e D_e. E experts, K of them, S the sum of a token's gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import Edit, MakeDense, Plan
from moe_compress.methods.registry import Need, method
from moe_compress.methods.score_registry import NAMES, Score, scores
from moe_compress.models.shape import ModelShape, MoEShape
from moe_compress.utils.choices import CountOr

Scale = Literal["mean", "share", "uniform"]
# As many experts as a token uses, or every one.
AS_MANY, EVERY = "top_k", "all"


def _needs(parameters: Mapping[str, Any]) -> Need:
    return "outputs" if scores()[parameters["score"]].needs == "outputs" else "text"


def _count(shape: MoEShape, keep: int | str) -> int:
    """How many experts of a layer are kept. ValueError for more than there are."""
    count = {AS_MANY: shape.top_k, EVERY: shape.num_experts}.get(str(keep), keep)
    assert isinstance(count, int)
    if count > shape.num_experts:
        raise ValueError(f"layer {shape.layer} has {shape.num_experts} experts, so keep={keep} is not possible.")
    return count


def _width(shape: ModelShape, keep: int | str) -> int:
    """Neurons of every dense MLP: of the layer that needs most, as a dense architecture has one width for all."""
    return max(*(_count(moe, keep) * moe.inner + moe.shared for moe in shape.moe), *shape.dense.values(), 0)


def _widened(shape: ModelShape, width: int) -> list[Edit]:
    """Layers without experts, made as wide as all others."""
    return [MakeDense(layer, (), (), width) for layer, neurons in shape.dense.items() if neurons != width]


def check(shape: ModelShape, *, keep: int | str, score: str, **_: Any) -> Plan:
    """Whether so many experts can be kept: a plan with arbitrary ones."""
    width = _width(shape, keep)
    counts = {moe.layer: _count(moe, keep) for moe in shape.moe}
    if scores()[score].chooses_sets:
        for moe in shape.moe:
            moe.require(counts[moe.layer])
    edits: list[Edit] = [MakeDense(i, tuple(range(n)), (1.0,) * n, width) for i, n in counts.items()]
    return Plan([*edits, *_widened(shape, width)], {}, {})


@method(
    "model",
    group="densification",
    paper="MoE-to-dense (arXiv 2605.28207); experts as slices of one MLP: LLaMA-MoE (2406.16554)",
    needs=_needs,
    check=check,
    breaks_patterns=True,
    shown_in_names=("keep", "score"),
)
def densify(
    model: ModelStatistics,
    *,
    keep: Annotated[int | str, CountOr((AS_MANY, EVERY))] = AS_MANY,
    score: Annotated[str, NAMES] = "reap",
    scale: Scale = "share",
    seed: int = 0,
) -> Plan:
    """Make the model dense: one MLP a layer of its best experts side by side, each with a fixed gate.

    keep: experts of every layer, as many as a token uses, or all; score: what chooses them, as for expert_drop; scale:
    their gates, the mean of what the router gave each over all tokens (mean), the same scaled so that they add up to
    what all experts had (share), or that sum over K for each (uniform). Shared experts join them with the gate 1, or
    the mean of their own.
    """
    chosen, table, width = scores()[score], dict[int, list[float | None]](), _width(model.shape, keep)
    edits: list[Edit] = []
    report: dict[str, Any] = {"width": width, "gates": {}}
    for layer in model.layers:
        index, count = layer.shape.layer, _count(layer.shape, keep)
        experts, score_E = _best(layer, chosen, count, seed)
        gates = _gates(layer, experts, scale)
        edits.append(MakeDense(index, tuple(experts), tuple(gates), width, _shared(layer)))
        table |= {} if score_E is None else {index: [float(s) if s.isfinite() else None for s in score_E]}
        total = float(layer.sums["total"] / layer.sums["tokens"])
        report["gates"][index] = {"kept": sum(_gates(layer, experts, "mean")), "of": total}
    return Plan([*edits, *_widened(model.shape, width)], table, report)


def _best(layer: LayerStatistics, score: Score, count: int, seed: int) -> tuple[list[int], Tensor | None]:
    """The experts to be kept, ascending, and the scores of all; those that no token reached come last."""
    if score.chooses_sets:
        return list(score.function(layer.output_sample(), layer.shape, count).kept), None
    score_E = score.of(layer, seed)
    order_E = score_E.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return sorted(order_E[:count].tolist()), score_E


def _gates(layer: LayerStatistics, experts: Sequence[int], scale: Scale) -> list[float]:
    """The fixed gate of each kept expert."""
    mean_E = layer.sums["gate"] / layer.sums["tokens"]
    total, kept_K = float(mean_E.sum()), mean_E[list(experts)]
    if scale == "uniform" or (scale == "share" and not float(kept_K.sum())):
        return [total / len(experts)] * len(experts)
    factor = total / float(kept_K.sum()) if scale == "share" else 1.0
    return (kept_K * factor).tolist()


def _shared(layer: LayerStatistics) -> float:
    """The fixed gate of the shared experts."""
    found = layer.sums.get("shared_gate")
    return 1.0 if found is None else float(found / layer.sums["tokens"])
