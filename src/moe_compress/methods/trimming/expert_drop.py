"""Expert Drop: remove whole routed experts, ranked by any of the scores in scores.py.

Dropping experts at an unchanged top-k shrinks what is stored, not what is computed per token. L layers, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.methods.trimming import scores
from moe_compress.methods.trimming.scores import WEIGHT_SCORES, Score
from moe_compress.model.edits import Edit, KeepExperts, Plan
from moe_compress.model.moe import MoEShape
from moe_compress.registry import Need, method
from moe_compress.stream.observers import LayerSums

PROTECTED = re.compile(r"(\d+):(\d+)")
# Where experts that no token reached rank: beyond every score, but short of the infinity of protected experts.
EXTREME = 1e300


def _needs(parameters: Mapping[str, Any]) -> Need:
    if parameters["protect"] == "super" or parameters["score"] not in (*WEIGHT_SCORES, "random"):
        return "text"
    return "weights" if parameters["score"] in WEIGHT_SCORES else "nothing"


def check(
    shapes: Sequence[MoEShape], *, keep: int | None, ratio: float | None, budget: str, protect: str, **_: Any
) -> Plan:
    """Whether the counts are possible, from shapes alone: a plan with the right counts and arbitrary ids.

    A global budget is spread evenly but for one layer, so that the plan is as uneven as the real one will be, and
    later stages are refused only where they must be.
    """
    blank = {shape.layer: torch.arange(shape.num_experts, dtype=torch.float64) for shape in shapes}
    blank[shapes[0].layer] -= 1
    protected = {} if protect == "super" else _protected(protect, shapes)
    _put_last(blank, protected)
    edits = _choose(shapes, blank, _kept(shapes, keep, ratio), budget)
    _require_protected(edits, protected)
    return Plan(edits, {}, {})


@method(
    "model",
    group="trimming",
    paper="Unified-MoE-Compression (arXiv 2406.02500), REAP (arXiv 2510.13999) and the papers of each score",
    needs=_needs,
    check=check,
    presets={"paper": {"score": "gate_mass", "gate": "paper", "budget": "global", "ratio": 0.25}},
    rivals=(("keep", "ratio"),),
    headline=("score", "keep", "ratio"),
)
def expert_drop(
    layers: Sequence[LayerSums],
    *,
    score: Score = "reap",
    keep: int | None = None,
    ratio: float | None = 0.25,
    budget: Literal["layer", "global"] = "layer",
    gate: Literal["topk", "full", "paper"] = "topk",
    reverse: bool = False,
    protect: str = "none",
    unseen: Literal["drop", "keep", "error"] = "drop",
    seed: int = 0,
) -> Plan:
    """Remove the lowest-scoring routed experts of every layer.

    keep: experts left per layer (on average, with budget=global), or ratio: fraction removed;
    budget: the same count in every layer, or one threshold over the model with a floor of top-k per layer;
    gate: what gate_mass sums: top-k gates, the full softmax, or what the paper's code sums for this family;
    reverse: drop the highest instead, as a control (experts without tokens still go as `unseen` says);
    protect: `layer:expert,...`, or `super` for super experts; unseen: experts that no token reached go first, stay,
    or are an error.
    """
    shapes = [layer.shape for layer in layers]
    kept = _kept(shapes, keep, ratio)
    table = {layer.shape.layer: _score(layer, score, gate, seed) for layer in layers}
    missed = {layer.shape.layer: _unseen(layer) for layer in layers}
    ranked = {i: _with_unseen(i, -s if reverse else s, missed[i], unseen) for i, s in table.items()}
    protected = _super(layers) if protect == "super" else _protected(protect, shapes)
    _put_last(ranked, protected)
    edits = _choose(shapes, ranked, kept, budget)
    _require_protected(edits, protected)
    report = {
        "experts_without_tokens": {i: ids for i, ids in missed.items() if ids},
        "protected": protected,
    }
    return Plan(edits, {index: _reported(score_E) for index, score_E in table.items()}, report)


def _kept(shapes: Sequence[MoEShape], keep: int | None, ratio: float | None) -> list[int]:
    """Experts to keep in each layer, checked against every constraint."""
    if keep is not None:
        kept = [keep] * len(shapes)
    elif ratio is not None and 0 <= ratio < 1:
        kept = [shape.num_experts - int(ratio * shape.num_experts + 0.5) for shape in shapes]
    else:
        raise ValueError(f"expert_drop.ratio={ratio}: the fraction of experts removed is in [0, 1).")
    for shape, count in zip(shapes, kept, strict=True):
        shape.require(count)
    return kept


def _score(layer: LayerSums, score: str, gate: str, seed: int) -> Tensor:
    if score == "random":
        return scores.random_score(layer.shape.num_experts, layer.shape.layer, seed)
    if score == "gate_mass" and (layer.paper_gate if gate == "paper" else gate) == "full":
        score = "gate_mass_full"
    return scores.FUNCTIONS[score](layer.sums)


def _unseen(layer: LayerSums) -> list[int]:
    if "count" not in layer.sums:
        return []
    return (layer.sums["count"] == 0).nonzero().flatten().tolist()


def _with_unseen(index: int, score_E: Tensor, unseen: Sequence[int], policy: str) -> Tensor:
    if unseen and policy == "error":
        raise ValueError(
            f"layer {index}: no calibration token reached experts {list(unseen)[:8]}: use more text (samples=), or "
            "unseen=drop or unseen=keep."
        )
    score_E = score_E.clone()
    score_E[list(unseen)] = EXTREME if policy == "keep" else -EXTREME
    bad = (~score_E.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"layer {index}: the scores of experts {bad[:8]} are not finite: choose another score=.")
    return score_E


def _reported(score_E: Tensor) -> list[float | None]:
    """The scores as they were measured; None where no token reached the expert."""
    return [value if math.isfinite(value) else None for value in score_E.tolist()]


def _super(layers: Sequence[LayerSums]) -> dict[int, list[int]]:
    maxima = {layer.shape.layer: layer.sums["max"] for layer in layers}
    return scores.super_experts(maxima, layers[0].total_layers)


def _put_last(ranked: Mapping[int, Tensor], protected: Mapping[int, Sequence[int]]) -> None:
    """Let the protected experts outrank all others."""
    for index, ids in protected.items():
        ranked[index][list(ids)] = torch.inf


def _protected(text: str, shapes: Sequence[MoEShape]) -> dict[int, list[int]]:
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
        found.setdefault(index, []).append(expert)
    return found


def _choose(shapes: Sequence[MoEShape], score_E: Mapping[int, Tensor], kept: Sequence[int], budget: str) -> list[Edit]:
    """Drop in steps, one expert of every router group at a time, cheapest steps first."""
    steps = {shape.layer: _steps(shape, score_E[shape.layer]) for shape in shapes}
    if budget == "layer":
        taken = {s.layer: (s.num_experts - count) // s.groups for s, count in zip(shapes, kept, strict=True)}
    else:
        total = sum(shape.num_experts - count for shape, count in zip(shapes, kept, strict=True))
        taken = _global_steps(shapes, steps, total)
    edits: list[Edit] = []
    for shape in shapes:
        gone = {expert for _, ids in steps[shape.layer][: taken[shape.layer]] for expert in ids}
        if gone:
            left = tuple(e for e in range(shape.num_experts) if e not in gone)
            edits.append(KeepExperts(shape.layer, left))
    return edits


def _steps(shape: MoEShape, score_E: Tensor) -> list[tuple[float, list[int]]]:
    """The order in which a layer gives up experts: (mean score, one expert of each group), ascending."""
    size = shape.num_experts // shape.groups
    grouped_GN = score_E.reshape(shape.groups, size)
    order_GN = torch.argsort(grouped_GN, dim=1, stable=True)
    offset_G = torch.arange(shape.groups) * size
    return [
        (float(grouped_GN.gather(1, order_GN[:, n : n + 1]).mean()), (order_GN[:, n] + offset_G).tolist())
        for n in range(size)
    ]


def _global_steps(
    shapes: Sequence[MoEShape], steps: Mapping[int, list[tuple[float, list[int]]]], total: int
) -> dict[int, int]:
    """How many steps each layer takes so that `total` experts go, lowest scores first, none below its floor."""
    allowed = {shape.layer: (shape.num_experts - shape.floor) // shape.groups for shape in shapes}
    pool = sorted(
        (score, index, n) for index, found in steps.items() for n, (score, _) in enumerate(found[: allowed[index]])
    )
    groups = shapes[0].groups
    if total > len(pool) * groups:
        raise ValueError(
            f"budget=global would drop {total} experts, but only {len(pool) * groups} can go while every layer keeps "
            "the experts that its router needs."
        )
    taken = dict.fromkeys(steps, 0)
    for _, index, _ in pool[: total // groups]:
        taken[index] += 1
    return taken


def _require_protected(edits: Sequence[Edit], protected: Mapping[int, Sequence[int]]) -> None:
    for edit in edits:
        lost = sorted(set(protected.get(edit.layer, ())) - set(edit.experts))
        if lost:
            raise ValueError(
                f"layer {edit.layer} cannot keep only {len(edit.experts)} experts and spare the protected {lost}: "
                "keep more, or protect fewer."
            )
