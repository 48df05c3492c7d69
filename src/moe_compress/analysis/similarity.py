"""How alike the experts of a layer are: their weights, what is routed to them, what they return; and who is alike.

E experts, F neurons of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.calibration.output_sample import OutputSample
from moe_compress.methods.expert_merge import grouping, similarity
from moe_compress.methods.expert_merge.alignment import EXACT, Neurons, order
from moe_compress.models.moe import Expert

# Experts in one mergeable group.
CAP = 4
# Median cosine of the outputs from which on experts look like copies of one dense layer.
PSEUDO = 0.5
# Multiplications that aligning pairs of one layer may take: half a minute on one core. No verdict needs them.
ALIGNMENT = 1 << 39


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike experts are, [E][E] (None: not compared), and from how many of what (`of`) each number comes."""

    matrix: list[list[float | None]]
    n: int
    of: str


def similarities(
    layer: LayerStatistics, sample: OutputSample, outputs_EE: Tensor, tokens: int
) -> dict[str, Similarity]:
    """By weights, by routed tokens (Jaccard of being used by one token) and by outputs."""
    routed_EE = similarity.jaccard(layer.sums["both"], layer.sums["count"])
    return {
        "weights": _weight_similarity(layer, outputs_EE, sample.inner_EFS.shape[1], sample.mean_ED.shape[1]),
        "routed": Similarity(_rounded(routed_EE), tokens, "tokens"),
        "outputs": Similarity(_rounded(outputs_EE), len(sample.logits_TE), "tokens"),
    }


def _rounded(matrix_EE: Tensor) -> list[list[float | None]]:
    """Five digits, beyond which no sample tells: files of many experts stay small."""
    return [[round(value, 5) for value in row] for row in matrix_EE.tolist()]


def _weight_similarity(layer: LayerStatistics, outputs_EE: Tensor, width: int, model_width: int) -> Similarity:
    """Cosine of aligned weights for the pairs whose outputs are most alike, as many as ALIGNMENT allows.

    None for the others, and for all where experts have more than EXACT neurons.
    """
    experts = layer.shape.num_experts
    matrix: list[list[float | None]] = [[1.0 if i == j else None for j in range(experts)] for i in range(experts)]
    most = ALIGNMENT // (width**2 * (6 * model_width + width)) if width <= EXACT else 0
    nearest = sorted(pairs(range(experts)), key=lambda pair: -float(outputs_EE[pair]))[:most]
    numbers = 0
    if nearest:
        with layer.view() as view:
            for i, j in nearest:
                matrix[i][j] = matrix[j][i] = round(aligned_cosine(view.expert(i), view.expert(j)), 5)
            numbers = sum(part.numel() for part in Neurons.of(view.expert(0)).weights)
    return Similarity(matrix, numbers, "weights")


def aligned_cosine(one: Expert, other: Expert) -> float:
    """Cosine of two experts' weights once the neurons are matched; gate, up and down count equally."""
    first, second = Neurons.of(one), Neurons.of(other)
    order_F = order(first, second, by="weights").to(one.down.device)
    parts = zip(first.parts("weights"), second.parts("weights"), strict=True)
    return min(1.0, float(sum((a * b[order_F]).sum(dtype=torch.float64) for a, b in parts)))


def moe_type(outputs_EE: Tensor) -> tuple[str, float]:
    """`pseudo` (experts like copies of one dense layer: upcycled) or `native`; and the median cosine of outputs."""
    away_EE = ~torch.eye(len(outputs_EE), dtype=torch.bool)
    middle = float(outputs_EE[away_EE].median()) if len(outputs_EE) > 1 else 0.0
    return ("pseudo" if middle >= PSEUDO else "native"), middle


def tight_groups(
    similarity_EE: Tensor, count_E: Tensor, members: Sequence[int], merges: int, threshold: float
) -> list[list[int]] | None:
    """So many merges by complete linkage, at most CAP a group, the most used member first; None if that takes a pair
    that is not alike."""
    left = len(members) - merges
    if left < 1 or CAP * left < len(members):
        return None
    ids = torch.tensor(list(members))
    inside_EE = similarity_EE[ids][:, ids]
    found = grouping.hierarchical(1 - inside_EE, left, linkage="complete", cap=CAP, weight_E=count_E[ids])
    groups = [[members[e] for e in group] for group in found if len(group) > 1]
    return groups if all(lowest(similarity_EE, group) > threshold for group in groups) else None


def lowest(similarity_EE: Tensor, group: Sequence[int]) -> float:
    """The similarity of the two members that are least alike."""
    return min(float(similarity_EE[pair]) for pair in pairs(group))


def all_groups(similarity_EE: Tensor, count_E: Tensor, members: Sequence[int], threshold: float) -> list[list[int]]:
    """Groups with as many merges as there are pairs alike."""
    best: list[list[int]] = []
    for merges in range(1, len(members)):
        found = tight_groups(similarity_EE, count_E, members, merges, threshold)
        if found is None:
            break
        best = found
    return best


def pairs(members: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs, in order."""
    return [(i, j) for place, i in enumerate(members) for j in members[place + 1 :]]
