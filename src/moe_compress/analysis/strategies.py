"""Strategies: which experts of a layer go, for a budget.

A strategy is a point on the budget axis. conservative lets 1/8 of a layer's experts go and keeps its specialists;
balanced lets 1/4 go and aggressive 1/2, both without regard to specialists. Counts are rounded up to what the router
allows. In this order go: experts that hardly any token uses, experts that are alike (merged), those of lowest REAP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from moe_compress.analysis.layer_analysis import LayerAnalysis, router_parts
from moe_compress.analysis.layer_plan import CompressionPlan, ExpertMergeResult
from moe_compress.analysis.similarity import lowest, tight_groups
from moe_compress.models.shape import MoEShape
from moe_compress.utils.choices import one_of

STRATEGIES = {"conservative": 1 / 8, "balanced": 1 / 4, "aggressive": 1 / 2}
# Relative error of the layer's routed output, up to which the impact is called so; beyond: significant.
IMPACTS = {"none": 0.01, "minimal": 0.1, "moderate": 0.3}


def impact_of(error: float) -> str:
    """A relative error of the routed output in a word."""
    return next((word for word, most in IMPACTS.items() if error <= most), "significant")


def strategy_target(analysis: LayerAnalysis, shape: MoEShape, strategy: str) -> int:
    """Experts that a strategy keeps; ValueError for an unknown one."""
    share = STRATEGIES[one_of(strategy, STRATEGIES, "strategy")]
    steps = math.ceil(shape.num_experts * (1 - share) / shape.groups)
    steps = max([steps, *(len(_protected(analysis, strategy) & {*part}) for part in router_parts(shape))])
    return max(shape.floor, steps * shape.groups)


def make_plan(analysis: LayerAnalysis, shape: MoEShape, target: int, strategy: str) -> CompressionPlan:
    """A plan that keeps exactly `target` experts, its effect not judged yet; ValueError if it is not possible."""
    one_of(strategy, STRATEGIES, "strategy")
    shape.require(target)
    similarity_EE, mass = analysis.outputs_EE, analysis.routed_mass
    groups, pruned = _chosen(analysis, similarity_EE, shape, target, strategy)
    merges = [
        ExpertMergeResult(group[1:], group[0], lowest(similarity_EE, group), shares=[mass[e] for e in group])
        for group in groups
    ]
    gone = {*pruned, *(e for group in groups for e in group)}
    return CompressionPlan(
        original_num_experts=shape.num_experts,
        target_num_experts=target,
        merges=merges,
        pruned_experts=sorted(pruned),
        kept_experts=[e for e in range(shape.num_experts) if e not in gone],
        estimated_memory_reduction=1 - target / shape.num_experts,
        estimated_quality_impact=impact_of(math.inf),
        layer_idx=shape.layer,
    )


def _protected(analysis: LayerAnalysis, strategy: str) -> set[int]:
    return set(analysis.specialist_experts) if strategy == "conservative" else set()


def _chosen(
    analysis: LayerAnalysis, similarity_EE: Tensor, shape: MoEShape, target: int, strategy: str
) -> tuple[list[list[int]], list[int]]:
    """Groups to merge and experts to prune, as many in every router group: as many merges as there are alike."""
    gone = (shape.num_experts - target) // shape.groups
    kept = _protected(analysis, strategy)
    parts = [[e for e in _ranked(analysis) if e in part and e not in kept] for part in router_parts(shape)]
    if min(map(len, parts)) < gone:
        raise ValueError(
            f"layer {shape.layer}: strategy=conservative keeps its specialists {sorted(kept)}, so "
            f"{target} experts are too few: choose more, or another strategy."
        )
    cold = min(gone, *(sum(e in analysis.prune_candidates for e in part) for part in parts))
    for merges in range(gone - cold, -1, -1):
        found = [_split(analysis, similarity_EE, part, cold, merges, gone - cold - merges) for part in parts]
        if all(each is not None for each in found):
            break
    halves = [each for each in found if each is not None]
    return [group for groups, _ in halves for group in groups], [e for _, pruned in halves for e in pruned]


def _ranked(analysis: LayerAnalysis) -> list[int]:
    """Experts in the order in which they may be pruned: those hardly used, then by REAP."""

    def rank(expert: int) -> tuple[bool, float]:
        score = analysis.reap[expert]
        return expert not in analysis.prune_candidates, -math.inf if score is None else score

    return sorted(range(analysis.num_experts), key=rank)


def _split(
    analysis: LayerAnalysis, similarity_EE: Tensor, ranked: Sequence[int], cold: int, merges: int, more: int
) -> tuple[list[list[int]], list[int]] | None:
    """One router group: prune `cold` experts, merge the most alike of the others, prune `more` of those left alone."""
    members = sorted(ranked[cold:])
    groups: list[list[int]] | None = []
    if merges:
        groups = tight_groups(similarity_EE, analysis.counts_E, members, merges, analysis.threshold)
    if groups is None:
        return None
    merged = {e for group in groups for e in group}
    alone = [e for e in ranked[cold:] if e not in merged]
    return None if len(alone) < more else (groups, [*ranked[:cold], *alone[:more]])
