"""Which experts of a layer are merged: groups, from what is near to what. E experts, D model width.

Every expert is in exactly one group. A group's first member represents it (its centroid), the others follow in
ascending order, and groups are ordered by their representatives.

Ties: two distances count as equal if they differ by less than TIE of the largest one. Of equally near pairs the one
with the lowest ids goes first (a cluster is called by its lowest member), so that float noise decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Groups = tuple[tuple[int, ...], ...]
Linkage = Literal["average", "complete", "single"]
# (matrix [E, E], weight [E], number of groups) -> groups.
Grouping = Callable[[Tensor, Tensor, int], Groups]

TIE = 1e-10
FROM_MEMBER: dict[str, Callable[[Any], Any]] = {"average": np.mean, "complete": np.max, "single": np.min}


def hierarchical(
    distance_EE: Tensor, count: int, *, linkage: Linkage = "average", cap: int | None = None, weight_E: Tensor
) -> Groups:
    """Agglomerative clusters, each represented by its member of largest weight (HC-SMoE, arXiv 2410.08589).

    Again and again the nearest two clusters with at most `cap` experts together become one, until `count` are left.
    average: mean over all pairs of members (UPGMA); complete: their farthest pair; single: their nearest pair.
    Where the cap leaves no two that fit together, the smallest cluster is broken up: each of its members joins the
    nearest cluster with room. weight_E [E]: NaN (an expert that no token reached) is below every number.
    """
    if linkage not in get_args(Linkage):
        raise ValueError(f"linkage={linkage}: allowed: {', '.join(get_args(Linkage))}.")
    table_EE = _table(distance_EE, weight_E)
    cap = _cap(len(table_EE), count, cap)
    clusters = _by_scipy(table_EE, count, linkage)
    if clusters is None or max(map(len, clusters)) > cap:
        clusters = _merge_nearest(table_EE, count, linkage, cap)
    while len(clusters) > count:
        clusters = _break_up(table_EE, clusters, linkage, cap)
    ranked = _most(weight_E, len(table_EE))
    return _as_groups({min(members, key=ranked.index): members for members in clusters})


def m_smoe(similarity_EE: Tensor, usage_E: Tensor, count: int, cap: int | None = None) -> Groups:
    """The `count` most used experts dominate; each other joins its most similar one (M-SMoE, arXiv 2310.01334).

    With a cap the most similar pairs choose first, and who finds its dominant expert full takes the next best.
    """
    distance_EE = -_table(similarity_EE, usage_E)
    cap, tie = _cap(len(distance_EE), count, cap), _tie(distance_EE)
    dominant = sorted(_most(usage_E, count))
    others = [e for e in range(len(distance_EE)) if e not in set(dominant)]
    groups: dict[int, list[int]] = {expert: [] for expert in dominant}
    # N the experts that join, C the dominant ones.
    open_NC = distance_EE[np.ix_(others, dominant)]
    for _ in others:
        n, c = divmod(_first_nearest(open_NC, tie), count)
        groups[dominant[c]].append(others[n])
        open_NC[n] = np.inf
        if len(groups[dominant[c]]) + 1 == cap:
            open_NC[:, c] = np.inf
    return _as_groups(groups)


def m_smoe_counts(
    usage: Mapping[int, Tensor], total: int, floor: Mapping[int, int], *, groups: int = 1
) -> dict[int, int]:
    """How many experts dominate in each layer, if `total` do in the model (M-SMoE's global threshold).

    usage: layer -> [E], compared after division by the layer's own sum; floor: fewest that a layer keeps. Ties go to
    the lowest layer. groups: where routing is limited to groups, one expert of each is taken at a time, by their mean.
    """
    counts = {layer: floor[layer] // groups for layer in usage}
    steps = {layer: _steps(usage_E, groups) for layer, usage_E in usage.items()}
    if any(floor[i] % groups or floor[i] > len(s) * groups for i, s in steps.items()) or total % groups:
        raise ValueError(f"total={total} and floor={dict(floor)} must be possible with {groups} router groups a layer.")
    left = total // groups - sum(counts.values())
    pool = sorted((-s, layer) for layer, found in steps.items() for s in found[counts[layer] :])
    if not 0 <= left <= len(pool):
        raise ValueError(
            f"{total} dominant experts are not possible: the layers keep at least {sum(counts.values()) * groups} and "
            f"have {sum(map(len, steps.values())) * groups}."
        )
    for _, layer in pool[:left]:
        counts[layer] += 1
    return {layer: n * groups for layer, n in counts.items()}


def _steps(usage_E: Tensor, groups: int) -> list[float]:
    """Normalised usage from the most used expert down; its mean over the router groups, rank by rank."""
    share_E = usage_E.double().cpu()
    share_E = share_E / share_E.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return share_E.reshape(groups, -1).sort(dim=1, descending=True).values.mean(0).tolist()


def ream(similarity_EE: Tensor, saliency_E: Tensor, count: int, cap: int = 16) -> Groups:
    """The `count` most salient experts are centroids and absorb the others (REAM, arXiv 2604.04356).

    From the most salient centroid on, each takes the nearest experts that are still free, up to `cap` with itself,
    until none is left: the last centroids mostly stay alone.
    """
    distance_EE = -_table(similarity_EE, saliency_E)
    cap, tie = _cap(len(distance_EE), count, cap), _tie(distance_EE)
    centroids = _most(saliency_E, count)
    distance_EE[:, centroids] = np.inf
    groups: dict[int, list[int]] = {}
    for centroid in centroids:
        row_E = distance_EE[centroid]
        room = min(cap - 1, int(np.isfinite(row_E).sum()))
        groups[centroid] = [_take(row_E, tie) for _ in range(room)]
        distance_EE[:, groups[centroid]] = np.inf
    return _as_groups(groups)


def within_router_groups(
    grouping: Grouping, matrix_EE: Tensor, weight_E: Tensor, count: int, router_groups: int
) -> Groups:
    """Group inside each router group (experts g*size to (g+1)*size-1), with equally many groups in each.

    grouping: called with the sub-matrix, the weights and the number of groups of one router group; `count` is that of
    the whole layer. Where routing is not limited (router_groups=1) the whole layer is one router group.
    """
    experts = len(matrix_EE)
    if experts % router_groups or count % router_groups:
        raise ValueError(
            f"{experts} experts in {router_groups} router groups cannot form {count} groups: every router group needs "
            "equally many."
        )
    size = experts // router_groups
    found: list[tuple[int, ...]] = []
    for start in range(0, experts, size):
        part = slice(start, start + size)
        inside = grouping(matrix_EE[part, part], weight_E[part], count // router_groups)
        found += [tuple(start + e for e in group) for group in inside]
    return tuple(found)


def _table(matrix_EE: Tensor, weight_E: Tensor) -> Array:
    """A symmetric float64 copy."""
    assert matrix_EE.shape == (len(weight_E), len(weight_E))
    table_EE = matrix_EE.double().cpu().numpy()
    finite_EE = np.isfinite(table_EE)
    if not finite_EE.all():
        bad_E = (~finite_EE).sum(1)
        worst = np.flatnonzero(bad_E == bad_E.max())[:8].tolist()
        raise ValueError(f"the distances of experts {worst} to the others are not finite (did any token reach them?).")
    if np.abs(table_EE - table_EE.T).max() > 1e-4 * np.abs(table_EE).max():
        raise ValueError("distances or similarities between experts must be symmetric.")
    return (table_EE + table_EE.T) / 2


def _cap(experts: int, count: int, cap: int | None) -> int:
    if not 0 < count <= experts:
        raise ValueError(f"{experts} experts cannot form {count} groups.")
    if cap is not None and cap * count < experts:
        raise ValueError(
            f"{experts} experts do not fit into {count} groups of at most {cap}: allow larger groups, or more of them."
        )
    return experts if cap is None else cap


def _tie(distance_EE: Array) -> float:
    return TIE * float(np.abs(distance_EE).max())


def _first_nearest(distance: Array, tie: float) -> int:
    """Flat index of the smallest entry: in reading order the first of all that are equally small."""
    return int(np.argmax(distance <= distance.min() + tie))


def _take(row_E: Array, tie: float) -> int:
    nearest = _first_nearest(row_E, tie)
    row_E[nearest] = np.inf
    return nearest


def _by_scipy(distance_EE: Array, count: int, method: str) -> list[list[int]] | None:
    """Clusters by scipy's linkage; None where two pairs are equally near, since scipy promises no order of ties."""
    from scipy.cluster import hierarchy  # here: to plan needs none of it, and should not wait for it
    from scipy.spatial.distance import squareform

    if len(distance_EE) < 2:
        return None
    pairs = squareform(distance_EE, checks=False)
    if (np.diff(np.sort(pairs)) <= _tie(pairs)).any():
        return None
    experts = len(distance_EE)
    clusters = {e: [e] for e in range(experts)}
    for step, (a, b) in enumerate(hierarchy.linkage(pairs, method)[: experts - count, :2].astype(int).tolist()):
        clusters[experts + step] = clusters.pop(a) + clusters.pop(b)
    return list(clusters.values())


def _merge_nearest(distance_EE: Array, count: int, linkage: str, cap: int) -> list[list[int]]:
    """Merge the nearest clusters that fit together until `count` are left, or none fit.

    One vectorised pass a merge, for what scipy's linkage does not know: caps, and an order of ties.
    """
    tie = _tie(distance_EE)
    clusters = {e: [e] for e in range(len(distance_EE))}
    near_EE = distance_EE.copy()
    np.fill_diagonal(near_EE, np.inf)
    size_E = np.ones(len(near_EE), dtype=np.int64)
    while len(clusters) > count:
        open_EE = np.where(size_E[:, None] + size_E > cap, np.inf, near_EE)
        a, b = divmod(_first_nearest(open_EE, tie), len(near_EE))
        if np.isinf(open_EE[a, b]):
            break
        near_EE[a] = near_EE[:, a] = _linked(near_EE[a], near_EE[b], size_E[a] / (size_E[a] + size_E[b]), linkage)
        near_EE[b] = near_EE[:, b] = near_EE[a, a] = np.inf
        size_E[a] += size_E[b]
        clusters[a] += clusters.pop(b)
    return list(clusters.values())


def _linked(a_E: Array, b_E: Array, share: float, linkage: str) -> Array:
    """Distances from the union of two clusters, of which `share` is the first one's part."""
    if linkage == "average":
        return share * a_E + (1 - share) * b_E
    return np.maximum(a_E, b_E) if linkage == "complete" else np.minimum(a_E, b_E)


def _break_up(distance_EE: Array, clusters: Iterable[list[int]], linkage: str, cap: int) -> list[list[int]]:
    """One cluster less: the members of the smallest one (of these the last) go where there is room."""
    *others, smallest = sorted(clusters, key=lambda members: (-len(members), min(members)))
    others.sort(key=min)
    for expert in sorted(smallest):
        room = [members for members in others if len(members) < cap]
        reached = np.array([FROM_MEMBER[linkage](distance_EE[expert, members]) for members in room])
        room[_first_nearest(reached, _tie(distance_EE))].append(expert)
    return others


def _most(weight_E: Tensor, count: int) -> list[int]:
    """The experts of largest weight, largest first, of equal ones the lowest id; NaN is below every number."""
    weights = weight_E.double().cpu().nan_to_num(-torch.inf, torch.inf, -torch.inf).tolist()
    return sorted(range(len(weights)), key=lambda e: (-weights[e], e))[:count]


def _as_groups(groups: Mapping[int, Sequence[int]]) -> Groups:
    return tuple((first, *sorted(set(groups[first]) - {first})) for first in sorted(groups))
