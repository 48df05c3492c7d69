"""Expert Drop: remove whole routed experts, ranked by a score or chosen as the set that rebuilds the layer best.

Dropping experts at an unchanged top-k shrinks what is stored, not what is computed per token. E experts, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import KeepExperts, Plan
from moe_compress.methods.allocation import AllocationSearch, Budget, Ladder, Taken, allocate, kept_counts
from moe_compress.methods.expert_drop import protection, subset_search
from moe_compress.methods.expert_drop.scores import gate_mass_full
from moe_compress.methods.registry import Need, method
from moe_compress.methods.score_registry import NAMES, scores
from moe_compress.models.shape import ModelShape, MoEShape

# Where experts that no token reached rank: beyond every score, but short of the infinity of protected experts.
EXTREME = 1e300
Steps = list[tuple[float, list[int]]]


def _needs(parameters: Mapping[str, Any]) -> Need:
    need = scores()[parameters["score"]].needs
    if need == "outputs":
        return need
    observed = parameters["protect"] == "super" or parameters["novice"] == "mean" or parameters["budget"] == "search"
    return "text" if observed else need


def check(  # noqa: PLR0913 - the recipe's parameters
    shape: ModelShape,
    *,
    keep: int | None,
    ratio: float | None,
    budget: Budget,
    protect: str,
    evaluations: int,
    propagate: str,
    score: str,
    novice: str,
    reverse: bool,
    unseen: str,
    **_: Any,
) -> Plan:
    """Whether the counts are possible, from shapes alone: a plan with the right counts and arbitrary ids.

    A global budget is spread evenly but for one layer, so that the plan is as uneven as the real one will be, and
    later stages are refused only where they must be.
    """
    _require_compatible(budget, protect, evaluations, propagate, score, reverse, unseen)
    blank = {moe.layer: torch.arange(moe.num_experts, dtype=torch.float64) for moe in shape.moe}
    blank[shape.moe[0].layer] -= 1
    protected = {} if protect == "super" else protection.parsed(protect, shape.moe)
    protection.put_last(blank, protected)
    steps = {moe.layer: _steps(moe, blank[moe.layer]) for moe in shape.moe}
    even = _even(shape.moe, keep, ratio, score, novice)
    taken, _report = allocate(_ladders(shape.moe, steps), even, "layer" if budget == "layer" else "global")
    edits = _edits(shape.moe, steps, taken)
    protection.require(edits, protected)
    return Plan([KeepExperts(e.layer, e.experts, novice == "mean") for e in edits], {}, {})


def _require_compatible(
    budget: str, protect: str, evaluations: int, propagate: str, score: str, reverse: bool, unseen: str
) -> None:
    if budget == "search" and evaluations < 1:
        raise ValueError(f"budget=search needs at least 1 evaluation, not evaluations={evaluations}.")
    if propagate == "compressed" and (budget != "layer" or protect != "none"):
        raise ValueError("propagate=compressed decides layer by layer: it goes with budget=layer and without protect=.")
    if scores()[score].chooses_sets and (protect != "none" or reverse or unseen != "drop"):
        raise ValueError(f"score={score} weighs whole sets of experts: leave out protect=, reverse= and unseen=.")


@method(
    "model",
    group="trimming",
    paper="Unified-MoE-Compression (arXiv 2406.02500), NAEE (2402.14800), REAP (2510.13999) and those of each score",
    needs=_needs,
    check=check,
    presets={
        "paper": {"score": "gate_mass", "gate": "paper", "budget": "global", "ratio": 0.25},
        "naee": {"score": "naee"},
    },
    exclusive=(("keep", "ratio"),),
    shown_in_names=("score", "keep", "ratio"),
    goes_with={"gate": "score=gate_mass", "evaluations": "budget=search"},
)
def expert_drop(  # noqa: PLR0913 - its arguments are the recipe's parameters
    model: ModelStatistics,
    *,
    score: Annotated[str, NAMES] = "reap",
    keep: int | None = None,
    ratio: float | None = 0.25,
    budget: Budget = "layer",
    propagate: Literal["original", "compressed"] = "original",
    novice: Literal["none", "mean"] = "none",
    gate: Literal["topk", "full", "paper"] = "topk",
    reverse: bool = False,
    protect: str = "none",
    unseen: Literal["drop", "keep", "error"] = "drop",
    evaluations: int = 100,
    seed: int = 0,
) -> Plan:
    """Remove the lowest-scoring routed experts of every layer, or keep the set that rebuilds its output best (naee).

    keep: experts left per layer (on average, unless budget=layer), or ratio: fraction removed; budget: the same
    count in every layer; one threshold over the model; or counts searched for in so many evaluations of the agreement
    with the original; propagate: judge later layers on the original activations, or on what the earlier cuts left;
    novice: leave a dropped expert's mean output in its place; gate: what gate_mass sums: top-k gates, the full softmax,
    or what the paper's code sums for this family; reverse: drop the highest instead, as a control (experts without
    tokens still go as `unseen` says); protect: `layer:expert,...`, or `super` for super experts; unseen: experts
    that no token reached go first, stay, or are an error.
    """
    shapes, sets = [layer.shape for layer in model.layers], scores()[score].chooses_sets
    even = _even(shapes, keep, ratio, score, novice)
    table = {layer.shape.layer: _score(layer, score, gate, seed) for layer in model.layers if not sets}
    missed = {layer.shape.layer: _unseen(layer) for layer in model.layers}
    ranked = {i: _with_unseen(i, -s if reverse else s, missed[i], unseen) for i, s in table.items()}
    protected = protection.super_experts(model.layers) if protect == "super" else protection.parsed(protect, shapes)
    protection.put_last(ranked, protected)
    if sets:
        steps = {layer.shape.layer: _rebuilding_steps(layer, budget) for layer in model.layers}
    else:
        steps = {shape.layer: _steps(shape, ranked[shape.layer]) for shape in shapes}
    make = functools.partial(_edits, shapes, steps)
    search = AllocationSearch(edits=make, evaluate=model.evaluate, evaluations=evaluations, seed=seed)
    taken, report = allocate(_ladders(shapes, steps), even, budget, search)
    edits = make(taken)
    if sets:
        edits, losses = _rebuilding(scores()[score].function, model.layers, edits)
        report |= {"reconstruction": losses}
    protection.require(edits, protected)
    report |= {"experts_without_tokens": {i: ids for i, ids in missed.items() if ids}, "protected": protected}
    if novice == "mean":
        edits = [_with_novices(layer, edits) for layer in model.layers if _edit_of(layer, edits)]
    return Plan(list(edits), {index: _reported(score_E) for index, score_E in table.items()}, report)


def _edit_of(layer: LayerStatistics, edits: Sequence[KeepExperts]) -> KeepExperts | None:
    return next((edit for edit in edits if edit.layer == layer.shape.layer), None)


def _with_novices(layer: LayerStatistics, edits: Sequence[KeepExperts]) -> KeepExperts:
    """Dropped experts leave their mean output over the tokens routed to them (MoNE, arXiv 2507.00390)."""
    edit = _edit_of(layer, edits)
    assert edit is not None
    gone = [e for e in range(layer.shape.num_experts) if e not in edit.experts]
    used_E = layer.sums["count"]
    active = float(used_E[list(edit.experts)].sum() / layer.sums["tokens"])
    outputs = {"outputs": layer.sums["mean_output"][gone].float()}
    return KeepExperts(edit.layer, edit.experts, novices=True, active=active, arrays=outputs)


def _rebuilding_steps(layer: LayerStatistics, budget: str) -> Steps:
    """Greedy elimination: what each step adds to the layer's relative squared error. Not needed for even counts."""
    if budget == "layer":
        return _steps(layer.shape, torch.arange(layer.shape.num_experts, dtype=torch.float64))
    before, steps = 0.0, []
    for ids, loss in subset_search.elimination_order(layer.output_sample(), layer.shape):
        steps.append((loss**2 - before, list(ids)))
        before = loss**2
    return steps


def _rebuilding(
    choose: Callable[..., subset_search.Choice], layers: Sequence[LayerStatistics], edits: Sequence[KeepExperts]
) -> tuple[list[KeepExperts], dict[int, dict[str, float]]]:
    """The best set of as many experts as each edit keeps, and how far it is from the layer's output."""
    found: list[KeepExperts] = []
    losses: dict[int, dict[str, float]] = {}
    for layer in layers:
        edit = _edit_of(layer, edits)
        if edit is not None:
            choice = choose(layer.output_sample(), layer.shape, len(edit.experts))
            found.append(KeepExperts(edit.layer, choice.kept))
            losses[edit.layer] = {"relative_error": choice.loss, "tokens_with_unknown_experts": choice.exhausted}
    return found, losses


def _even(shapes: Sequence[MoEShape], keep: int | None, ratio: float | None, score: str, novice: str) -> Taken:
    """Steps that every layer takes alike; naee weighs sets of experts as the router would do with them alone."""
    whole = novice == "mean" and not scores()[score].chooses_sets
    counts = kept_counts(shapes, keep, ratio, "expert_drop", router_whole=whole)
    return {s.layer: (s.num_experts - counts[s.layer]) // s.groups for s in shapes}


def _score(layer: LayerStatistics, score: str, gate: str, seed: int) -> Tensor:
    if score == "gate_mass" and (layer.paper_gate if gate == "paper" else gate) == "full":
        return gate_mass_full(layer.sums)
    return scores()[score].of(layer, seed)


def _unseen(layer: LayerStatistics) -> list[int]:
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


def _edits(shapes: Sequence[MoEShape], steps: Mapping[int, Steps], taken: Taken) -> list[KeepExperts]:
    """What is kept once every layer has taken its steps, cheapest first."""
    edits: list[KeepExperts] = []
    for shape in shapes:
        gone = {expert for _, ids in steps[shape.layer][: taken[shape.layer]] for expert in ids}
        if gone:
            edits.append(KeepExperts(shape.layer, tuple(e for e in range(shape.num_experts) if e not in gone)))
    return edits


def _ladders(shapes: Sequence[MoEShape], steps: Mapping[int, Steps]) -> dict[int, Ladder]:
    """The steps that leave every layer the experts that its router needs."""
    return {
        shape.layer: Ladder(
            tuple(cost for cost, _ in steps[shape.layer][: (shape.num_experts - shape.floor) // shape.groups]),
            shape.groups,
        )
        for shape in shapes
    }


def _steps(shape: MoEShape, score_E: Tensor) -> Steps:
    """The order in which a layer gives up experts: (mean score, one expert of each group), ascending."""
    size = shape.num_experts // shape.groups
    grouped_GN = score_E.reshape(shape.groups, size)
    order_GN = torch.argsort(grouped_GN, dim=1, stable=True)
    cost_N = grouped_GN.gather(1, order_GN).mean(0)
    expert_GN = order_GN + torch.arange(shape.groups).unsqueeze(1) * size
    return list(zip(cost_N.tolist(), expert_GN.T.tolist(), strict=True))
