"""Expert Merge: groups of similar experts become one, their weighted mean. E experts, F neurons of an expert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.edits.edits import MergeExperts, Plan
from moe_compress.methods.allocation import AllocationSearch, Budget, Ladder, Taken, allocate, kept_counts
from moe_compress.methods.expert_drop import scores
from moe_compress.methods.expert_merge import grouping as grouped
from moe_compress.methods.expert_merge import similarity
from moe_compress.methods.expert_merge.alignment import aligned_order
from moe_compress.methods.expert_merge.grouping import Groups, Linkage, m_smoe_counts, within_router_groups
from moe_compress.methods.registry import Need, method
from moe_compress.models.shape import ModelShape, MoEShape
from moe_compress.utils.choices import Means

Grouping = Literal["hc_smoe", "m_smoe", "ream"]
By = Literal["outputs", "logits", "weights", "coactivation", "outputs+logits"]
Align = Literal["none", "weights", "activations", "both"]
Average = Literal["frequency", "saliency", "uniform"]
Router = Literal["centroid", "sum"]
PAPERS = "HC-SMoE (arXiv 2410.08589), M-SMoE (2310.01334), REAM (2604.04356)"


def _needs(parameters: Mapping[str, Any]) -> Need:
    if parameters["by"] == "outputs" or parameters["align"] in ("activations", "both"):
        return "outputs"
    counted = parameters["average"] != "uniform" or parameters["grouping"] != "hc_smoe"
    if counted or parameters["by"] != "weights" or parameters["budget"] != "layer":
        return "text"
    return "weights"


def check(
    shape: ModelShape,
    *,
    keep: int | None,
    ratio: float | None,
    budget: Budget,
    cap: int | None,
    router: Router,
    propagate: str,
    evaluations: int,
    **_: Any,
) -> Plan:
    """Whether the counts are possible, from shapes alone: a plan with the right counts and arbitrary groups."""
    if budget == "search" and evaluations < 1:
        raise ValueError(f"budget=search needs at least 1 evaluation, not evaluations={evaluations}.")
    if propagate == "compressed" and budget != "layer":
        raise ValueError("propagate=compressed decides layer by layer, so it goes with budget=layer.")
    counts = kept_counts(shape.moe, keep, ratio, "expert_merge", router_whole=router == "sum")
    edits = []
    for moe in shape.moe:
        count = counts[moe.layer]
        if cap is not None and cap * count < moe.num_experts:
            raise ValueError(
                f"cap={cap}: {count} groups of at most {cap} cannot hold the {moe.num_experts} experts of layer "
                f"{moe.layer}."
            )
        edits.append(_arbitrary(moe, count, router))
    return Plan([edit for edit in edits if edit is not None], {}, {})


def _floor(shape: MoEShape, router: Router, cap: int | None) -> int:
    """Fewest groups: what the router needs, and what holds all experts with at most `cap` in each."""
    parts = _router_groups(shape, router)
    holding = parts * -(-shape.num_experts // (parts * cap)) if cap else 1
    return max(shape.floor if router == "centroid" else 1, holding)


def _router_groups(shape: MoEShape, router: Router) -> int:
    """Merged experts must lie evenly in the router's groups only if router rows go."""
    return shape.groups if router == "centroid" else 1


def _arbitrary(shape: MoEShape, count: int, router: Router) -> MergeExperts | None:
    parts = _router_groups(shape, router)
    size, each = shape.num_experts // parts, count // parts
    groups: list[tuple[int, ...]] = []
    for part in range(parts):
        ids = range(part * size, (part + 1) * size)
        groups += [(expert,) for expert in ids[: each - 1]] + [tuple(ids[each - 1 :])]
    return _edit(shape.layer, tuple(groups), torch.ones(shape.num_experts), router)


@method(
    "model",
    group="trimming",
    paper=PAPERS,
    needs=_needs,
    check=check,
    presets={
        "hc_smoe": {"grouping": "hc_smoe", "by": "outputs", "average": "frequency", "router": "sum"},
        "m_smoe": {"grouping": "m_smoe", "by": "logits", "average": "frequency", "align": "weights", "router": "sum"}
        | {"budget": "global"},
        "ream": {"grouping": "ream", "by": "outputs+logits", "average": "saliency", "align": "both", "cap": 16}
        | {"router": "centroid", "propagate": "compressed"},
    },
    breaks_patterns=True,
    exclusive=(("keep", "ratio"),),
    shown_in_names=("grouping", "router", "keep", "ratio"),
    goes_with={"linkage": "grouping=hc_smoe", "evaluations": "budget=search"},
)
def expert_merge(  # noqa: PLR0913 - its arguments are the recipe's parameters
    model: ModelStatistics,
    *,
    grouping: Grouping = "hc_smoe",
    keep: int | None = None,
    ratio: float | None = 0.25,
    by: By = "outputs",
    average: Average = "frequency",
    align: Align = "none",
    router: Router = "centroid",
    budget: Budget = "layer",
    linkage: Linkage = "average",
    cap: Annotated[int | None, Means("none: no limit")] = None,
    propagate: Literal["original", "compressed"] = "original",
    evaluations: int = 100,
    seed: int = 0,
) -> Plan:
    """Merge similar experts of each layer into their weighted mean.

    grouping: hc_smoe (agglomerative, with `linkage`), m_smoe (others join the most used experts) or ream (the most
    salient absorb their nearest, at most `cap` a group); keep: experts left per layer, or ratio: fraction removed;
    by: what makes experts similar: mean outputs on the same tokens, router logits, weights, being used together, or
    outputs and logits (REAM); average: weigh by tokens, by REAP saliency, or alike; align: put the neurons of a
    group's experts into one order first, judged by weights, activations or both; router: keep the representative's
    row (centroid, loads anywhere) or all rows, whose gates add up (sum, as in the papers; an edited checkpoint).
    """
    shapes = [layer.shape for layer in model.layers]
    even = kept_counts(shapes, keep, ratio, "expert_merge", router_whole=router == "sum")
    by_layer = {layer.shape.layer: layer for layer in model.layers}

    @functools.cache
    def distance(index: int) -> Tensor:
        return _distance(by_layer[index], by)

    @functools.cache
    def merged(index: int, count: int) -> MergeExperts | None:
        layer = by_layer[index]
        weight_E = _weight(layer, average)
        groups = _groups(
            layer, _distance(layer, by), _rank(layer, grouping, weight_E), count, grouping, linkage, cap, router
        )
        return _aligned(layer, _edit(index, groups, weight_E, router), align)

    def edits(counts: Mapping[int, int]) -> list[Any]:
        return [edit for index, count in counts.items() if (edit := merged(index, count)) is not None]

    floor = {shape.layer: _floor(shape, router, cap) for shape in shapes}
    counts, report = _allocated(model, even, floor, budget, router, edits, evaluations, seed)
    found = edits(counts)
    report["groups"] = {edit.layer: [list(group) for group in edit.groups if len(group) > 1] for edit in found}
    return Plan(found, {}, report)


def _allocated(
    model: ModelStatistics,
    even: Mapping[int, int],
    floor: Mapping[int, int],
    budget: Budget,
    router: Router,
    edits: Callable[[Mapping[int, int]], list[Any]],
    evaluations: int,
    seed: int,
) -> tuple[Mapping[int, int], dict[str, Any]]:
    """How many experts each layer keeps: a global budget follows M-SMoE's threshold on the share of tokens."""
    shapes = {layer.shape.layer: layer.shape for layer in model.layers}
    if budget == "layer":
        return even, {}
    sizes = {index: _router_groups(shape, router) for index, shape in shapes.items()}
    usage = {layer.shape.layer: layer.sums["count"] for layer in model.layers}
    counts = m_smoe_counts(usage, sum(even.values()), floor, groups=next(iter(sizes.values())))
    if budget == "global":
        return counts, {}
    ladders = {
        index: Ladder((0.0,) * ((shape.num_experts - floor[index]) // sizes[index]), sizes[index])
        for index, shape in shapes.items()
    }

    def steps(kept: Mapping[int, int]) -> Taken:
        return {index: (shapes[index].num_experts - count) // sizes[index] for index, count in kept.items()}

    def kept(taken: Taken) -> dict[int, int]:
        return {index: shapes[index].num_experts - n * sizes[index] for index, n in taken.items()}

    search = AllocationSearch(
        edits=lambda taken: edits(kept(taken)), evaluate=model.evaluate, evaluations=evaluations, seed=seed
    )
    taken, report = allocate(ladders, steps(even), "search", search, steps(counts))
    return kept(taken), report


# --- one layer ----------------------------------------------------------------------------------------------


def _distance(layer: LayerStatistics, by: By) -> Tensor:
    """How unlike two experts are, [E, E]."""
    if "logits" in by and layer.shape.aliased:
        raise ValueError(
            f"layer {layer.shape.layer} was merged with router=sum, so its experts have several router rows each: "
            "use by=outputs."
        )
    if by == "outputs":
        return similarity.output_distance(layer.output_sample().mean_ED)
    if by == "logits":
        return 1 - similarity.logit_cosine(layer.sums["logit_gram"])
    if by == "coactivation":
        return 1 - similarity.jaccard(layer.sums["both"], layer.sums["count"])
    if by == "weights":
        with layer.view() as view:
            return 1 - similarity.weight_cosine(view)
    outputs_EE = similarity.output_cosine(layer.sums["mean_gated_output"])
    return 1 - (outputs_EE + similarity.gaussian_logit_similarity(layer.sums["logit_gram"])) / 2


def _weight(layer: LayerStatistics, average: Average) -> Tensor:
    """The share of each expert in the mean of its group, [E]; an expert without tokens has none."""
    if average == "uniform":
        return torch.ones(layer.shape.num_experts, dtype=torch.float64)
    weight_E = scores.frequency(layer.sums) if average == "frequency" else scores.reap(layer.sums)
    return weight_E.nan_to_num(0.0)


def _rank(layer: LayerStatistics, grouping: Grouping, weight_E: Tensor) -> Tensor:
    """Who represents a group: the most used expert, or for REAM the most salient."""
    if grouping == "ream":
        return scores.reap(layer.sums)
    return layer.sums.get("count", weight_E)


def _groups(
    layer: LayerStatistics,
    distance_EE: Tensor,
    rank_E: Tensor,
    count: int,
    grouping: Grouping,
    linkage: Linkage,
    cap: int | None,
    router: Router,
) -> Groups:
    """Groups of one layer, formed inside the router's groups where it has some."""
    if grouping == "hc_smoe":

        def form(table_EE: Tensor, weight_E: Tensor, number: int) -> Groups:
            return grouped.hierarchical(table_EE, number, linkage=linkage, cap=cap, weight_E=weight_E)

    elif grouping == "m_smoe":

        def form(table_EE: Tensor, weight_E: Tensor, number: int) -> Groups:
            return grouped.m_smoe(-table_EE, weight_E, number, cap)

    else:

        def form(table_EE: Tensor, weight_E: Tensor, number: int) -> Groups:
            return grouped.ream(-table_EE, weight_E, number, cap or len(table_EE))

    return within_router_groups(form, distance_EE, rank_E, count, _router_groups(layer.shape, router))


def _edit(index: int, groups: Groups, weight_E: Tensor, router: Router) -> MergeExperts | None:
    """The merge, or None if every expert stays alone. A group without any weight is averaged evenly."""
    if all(len(group) == 1 for group in groups):
        return None
    shares = []
    for group in groups:
        share = weight_E[list(group)].tolist()
        shares.append(tuple(share) if sum(share) > 0 else (1.0,) * len(group))
    return MergeExperts(index, groups, tuple(shares), router)


def _aligned(layer: LayerStatistics, edit: MergeExperts | None, align: Align) -> MergeExperts | None:
    """The merge with the order of neurons that brings each expert closest to its group's representative."""
    if edit is None or align == "none":
        return edit
    inner = None
    if align != "weights":
        inner_EFS = layer.output_sample().inner_EFS
        inner = inner_EFS.__getitem__
    with layer.view() as view:
        order_EF = aligned_order(edit.groups, view, inner, align)
    return MergeExperts(edit.layer, edit.groups, edit.weights, edit.router, aligned=True, arrays={"order": order_EF})
