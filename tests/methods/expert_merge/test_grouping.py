"""Groupings equal textbook loops, keep their caps, and are not decided by float noise."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from moe_compress.methods.expert_drop import scores
from moe_compress.methods.expert_merge.grouping import (
    Groups,
    hierarchical,
    m_smoe,
    m_smoe_counts,
    ream,
    within_router_groups,
)
from moe_compress.methods.expert_merge.similarity import (
    gaussian_logit_similarity,
    logit_cosine,
    output_cosine,
    output_distance,
)
from moe_compress.models.moe import moe_views
from moe_compress.models.shape import MoEShape
from support import tiny

LINKAGES = ("average", "complete", "single")
LINKED = {"average": statistics.fmean, "complete": max, "single": min}
SEEDS = range(12)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(experts: int, seed: int) -> Tensor:
    return output_distance(random(experts, 4, seed=seed))


def gram(seed: int, experts: int = 16) -> Tensor:
    logits_TE = random(50, experts, seed=seed)
    return logits_TE.T @ logits_TE


def ones(experts: int) -> Tensor:
    return torch.ones(experts)


def partition(groups: Groups) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def assert_groups(groups: Groups, experts: int, count: int, cap: int | None = None) -> None:
    """What holds of every grouping."""
    assert sorted(e for group in groups for e in group) == list(range(experts))
    assert len(groups) == count and max(map(len, groups)) <= (cap or experts)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert all(list(group[1:]) == sorted(group[1:]) for group in groups)


def naive_clusters(distance_EE: Tensor, count: int, linkage: str, cap: int) -> set[frozenset[int]]:
    """The textbook: look at every pair of clusters, and at every pair of their members, before every merge."""
    table = distance_EE.tolist()
    clusters = [[e] for e in range(len(table))]
    while len(clusters) > count:
        best = None
        for a in clusters:
            for b in clusters:
                if a < b and len(a) + len(b) <= cap:
                    between = LINKED[linkage]([table[i][j] for i in a for j in b])
                    best = min(best, (between, a, b)) if best else (between, a, b)
        if best is None:
            break
        clusters = [c for c in clusters if c not in best[1:]] + [best[1] + best[2]]
    return set(map(frozenset, clusters))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_are_the_textbooks(seed, linkage):
    distance_EE = distances(14, seed)
    for count in (1, 2, 5, 9, 14):
        groups = hierarchical(distance_EE, count, linkage=linkage, weight_E=random(14))
        assert_groups(groups, 14, count)
        assert partition(groups) == naive_clusters(distance_EE, count, linkage, 14)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_clusters_are_those_of_scipy(linkage):
    for seed, experts in enumerate((2, 3, 17, 60, 128)):
        distance_EE = distances(experts, seed)
        tree = hierarchy.linkage(squareform(distance_EE.numpy()), linkage)
        for count in {1, experts // 2, experts - 1}:
            labels = hierarchy.fcluster(tree, count, "maxclust").tolist()
            expected = {frozenset(e for e in range(experts) if labels[e] == label) for label in labels}
            assert partition(hierarchical(distance_EE, count, linkage=linkage, weight_E=ones(experts))) == expected


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_with_a_cap_are_the_textbooks_while_any_two_fit_together(seed, linkage):
    distance_EE = distances(15, seed)
    for count, cap in ((4, 6), (6, 4), (8, 2), (12, 2)):
        groups = hierarchical(distance_EE, count, linkage=linkage, cap=cap, weight_E=ones(15))
        assert_groups(groups, 15, count, cap)
        expected = naive_clusters(distance_EE, count, linkage, cap)
        assert len(expected) > count or partition(groups) == expected


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_tightest_caps_still_give_the_count(seed, linkage):
    for count, cap in ((4, 3), (3, 4), (2, 6), (5, 3), (12, 1), (1, 12)):
        groups = hierarchical(distances(12, seed), count, linkage=linkage, cap=cap, weight_E=ones(12))
        assert_groups(groups, 12, count, cap)


def test_a_cap_that_strands_three_pairs_breaks_up_the_last():
    points = torch.tensor([0.0, 0.1, 10.0, 10.1, 6.0, 6.2])
    groups = hierarchical((points[:, None] - points).abs(), 2, linkage="average", cap=3, weight_E=ones(6))
    assert groups == ((0, 1, 5), (2, 3, 4))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_two_tight_pairs_are_two_groups(linkage):
    """Peers' `complete` merged the farthest pair: [0, 0, 1, 0]."""
    points = torch.tensor([0.0, 0.1, 5.0, 5.1])
    groups = hierarchical((points[:, None] - points).abs(), 2, linkage=linkage, weight_E=ones(4))
    assert groups == ((0, 1), (2, 3))


@pytest.mark.parametrize("linkage", ["hirarchical", "avarage", "ward", "kmeans", ""])
def test_an_unknown_linkage_is_refused(linkage):
    """A peer's scripts misspelt `hierarchical` and silently ran k-means."""
    with pytest.raises(ValueError, match=f"linkage={linkage}: allowed: average, complete, single"):
        hierarchical(distances(4, 0), 2, linkage=linkage, weight_E=ones(4))


def test_average_linkage_counts_every_pair_once():
    """The unweighted mean of two clusters' distances (WPGMA) would put 3 with 4."""
    distance_EE = torch.full((5, 5), 20.0)
    for a, b, value in ((0, 1, 1), (0, 2, 2), (1, 2, 2), (0, 3, 4), (1, 3, 4), (2, 3, 8), (3, 4, 5.7)):
        distance_EE[a, b] = distance_EE[b, a] = value
    assert hierarchical(distance_EE, 2, linkage="average", weight_E=ones(5)) == ((0, 1, 2, 3), (4,))
    weighted = hierarchy.fcluster(hierarchy.linkage(squareform(distance_EE, checks=False), "weighted"), 2, "maxclust")
    assert weighted[3] == weighted[4] != weighted[0]


def test_distances_are_not_taken_twice():
    """Distances between the rows of a distance matrix are another measure, and other groups."""
    differing = 0
    for seed in SEEDS:
        distance_EE = distances(10, seed)
        first = naive_clusters(distance_EE, 5, "average", 10)
        assert partition(hierarchical(distance_EE, 5, weight_E=ones(10))) == first
        differing += naive_clusters(torch.cdist(distance_EE, distance_EE), 5, "average", 10) != first
    assert differing > 0


def test_the_heaviest_member_represents_and_the_lowest_of_equals():
    points = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])
    distance_EE = (points[:, None] - points).abs()
    weight_E = torch.tensor([1.0, 3.0, 3.0, float("nan"), -2.0, float("nan")])
    assert hierarchical(distance_EE, 3, weight_E=weight_E) == ((1, 0, 2), (4, 3), (5,))


def test_of_equally_near_pairs_the_lowest_ids_merge_first():
    distance_EE = 1 - torch.eye(6, dtype=torch.float64)
    for linkage in LINKAGES:
        assert hierarchical(distance_EE, 3, linkage=linkage, weight_E=ones(6)) == ((0, 1, 2, 3), (4,), (5,))
        assert hierarchical(distance_EE, 3, linkage=linkage, cap=2, weight_E=ones(6)) == ((0, 1), (2, 3), (4, 5))
        assert hierarchical(distance_EE, 2, linkage=linkage, cap=4, weight_E=ones(6)) == ((0, 1, 2, 3), (4, 5))


def lattice() -> Tensor:
    """Points on a grid: hardly a distance that is not tied."""
    points = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0)).double()
    return torch.cdist(points, points)


GROUPINGS: dict[str, Callable[[Tensor], Groups]] = {
    **{name: lambda d, n=name: hierarchical(d, 5, linkage=n, cap=4, weight_E=ones(12)) for name in LINKAGES},
    "m_smoe": lambda d: m_smoe(1 - d, torch.arange(12) % 3, 5, cap=4),
    "ream": lambda d: ream(1 - d, torch.arange(12) % 3, 5, cap=4),
}


@pytest.mark.parametrize("name", GROUPINGS)
def test_float_noise_decides_nothing(name):
    expected = GROUPINGS[name](lattice())
    for seed in SEEDS:
        noise_EE = random(12, 12, seed=seed)
        assert GROUPINGS[name](lattice() * (1 + 1e-12 * (noise_EE + noise_EE.T))) == expected
        assert GROUPINGS[name](1e-7 * lattice() * (1 + 1e-12 * noise_EE)) == GROUPINGS[name](1e-7 * lattice())


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_do_not_depend_on_how_experts_are_numbered(seed):
    distance_EE, weight_E = distances(12, seed), random(12, seed=seed)
    new_E = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    for grouping in (
        lambda d, w: hierarchical(d, 5, linkage="average", cap=4, weight_E=w),
        lambda d, w: hierarchical(d, 5, linkage="complete", weight_E=w),
        lambda d, w: m_smoe(-d, w, 5, cap=4),
        lambda d, w: ream(-d, w, 5, cap=4),
    ):
        moved = grouping(distance_EE[new_E][:, new_E], weight_E[new_E])
        back = sorted((int(new_E[g[0]]), *sorted(new_E[list(g[1:])].tolist())) for g in moved)
        assert tuple(back) == grouping(distance_EE, weight_E)


def naive_m_smoe(similarity_EE: Tensor, usage_E: Tensor, count: int) -> set[frozenset[int]]:
    ranked = sorted(range(len(usage_E)), key=lambda e: (-float(usage_E[e]), e))
    groups = {dominant: {dominant} for dominant in ranked[:count]}
    for expert in ranked[count:]:
        groups[max(sorted(groups), key=lambda d: float(similarity_EE[expert, d]))].add(expert)
    return set(map(frozenset, groups.values()))


@pytest.mark.parametrize("seed", SEEDS)
def test_m_smoe_joins_the_most_similar_dominant_expert(seed):
    similarity_EE, usage_E = logit_cosine(gram(seed)), random(16, seed=seed).abs()
    for count in (1, 4, 15, 16):
        groups = m_smoe(similarity_EE, usage_E, count)
        assert_groups(groups, 16, count)
        assert {g[0] for g in groups} == set(usage_E.topk(count).indices.tolist())
        assert partition(groups) == naive_m_smoe(similarity_EE, usage_E, count)
        assert_groups(m_smoe(similarity_EE, usage_E, count, cap=-(-16 // count)), 16, count, -(-16 // count))


def test_a_full_dominant_expert_sends_the_less_similar_on():
    similarity_EE = torch.eye(5)
    for a, b, value in ((0, 2, 0.9), (0, 3, 0.8), (0, 4, 0.7), (1, 2, 0.1), (1, 3, 0.2), (1, 4, 0.3)):
        similarity_EE[a, b] = similarity_EE[b, a] = value
    usage_E = torch.tensor([9.0, 8.0, 1.0, 1.0, 1.0])
    assert m_smoe(similarity_EE, usage_E, 2) == ((0, 2, 3, 4), (1,))
    assert m_smoe(similarity_EE, usage_E, 2, cap=3) == ((0, 2, 3), (1, 4))


def naive_counts(usage: dict[int, Tensor], total: int, floor: dict[int, int]) -> dict[int, int]:
    kept = {layer: sorted((u / u.sum()).tolist(), reverse=True)[: floor[layer]] for layer, u in usage.items()}
    rest = [(v, i) for i, u in usage.items() for v in sorted((u / u.sum()).tolist(), reverse=True)[floor[i] :]]
    for value, layer in sorted(rest, key=lambda pair: (-pair[0], pair[1]))[: total - sum(map(len, kept.values()))]:
        kept[layer].append(value)
    return {layer: len(values) for layer, values in kept.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_global_threshold_gives_exactly_the_total(seed):
    usage = {layer: random(8, seed=10 * seed + layer).abs() * 10**layer for layer in (1, 2, 5)}
    for total in (3, 6, 11, 23, 24):
        for floor in (dict.fromkeys(usage, 1), {1: 1, 2: 0, 5: 2}):
            counts = m_smoe_counts(usage, total, floor)
            assert counts == naive_counts(usage, total, floor)
            assert sum(counts.values()) == total and all(counts[i] >= floor[i] for i in usage)


def test_the_global_threshold_favours_the_layer_with_more_heavily_used_experts():
    usage = {0: torch.tensor([97.0, 1.0, 1.0, 1.0]), 1: torch.tensor([2.0, 2.0, 2.0, 2.0])}
    assert m_smoe_counts(usage, 5, {0: 1, 1: 1}) == {0: 1, 1: 4}
    assert m_smoe_counts({0: torch.zeros(4), 1: torch.ones(4)}, 4, {0: 1, 1: 1}) == {0: 1, 1: 3}


def test_the_global_threshold_takes_whole_steps_where_routing_is_limited_to_groups():
    usage = {0: torch.tensor([9.0, 1.0, 8.0, 2.0]), 1: torch.tensor([5.0, 5.0, 5.0, 5.0])}
    assert m_smoe_counts(usage, 6, {0: 2, 1: 2}, groups=2) == {0: 2, 1: 4}
    with pytest.raises(ValueError, match="2 router groups"):
        m_smoe_counts(usage, 5, {0: 2, 1: 2}, groups=2)


@pytest.mark.parametrize(("total", "floor"), [(1, 1), (9, 1), (3, 5)])
def test_impossible_totals_are_refused(total, floor):
    with pytest.raises(ValueError, match=f"{total}"):
        m_smoe_counts({0: ones(4), 1: ones(4)}, total, {0: floor, 1: floor})


def naive_ream(similarity_EE: Tensor, saliency_E: Tensor, count: int, cap: int) -> dict[int, set[int]]:
    ranked = sorted(range(len(saliency_E)), key=lambda e: (-float(saliency_E[e]), e))
    groups, free = {}, set(ranked[count:])
    for centroid in ranked[:count]:
        near = sorted(free, key=lambda e: (-float(similarity_EE[centroid, e]), e))[: cap - 1]
        groups[centroid] = {centroid, *near}
        free -= set(near)
    return groups


@pytest.mark.parametrize("seed", SEEDS)
def test_ream_walks_from_the_most_salient_centroid(seed):
    similarity_EE, saliency_E = output_cosine(random(20, 5, seed=seed)), random(20, seed=seed).abs()
    for count, cap in ((4, 16), (10, 3), (5, 4), (20, 1), (1, 20)):
        groups = ream(similarity_EE, saliency_E, count, cap)
        assert_groups(groups, 20, count, cap)
        assert {group[0]: set(group) for group in groups} == naive_ream(similarity_EE, saliency_E, count, cap)


def test_ream_leaves_most_groups_alone():
    groups = ream(output_cosine(random(128, 8)), random(128).abs(), 96)
    assert sorted(map(len, groups)) == [1] * 93 + [3, 16, 16]


def test_ream_ranks_by_the_gate_not_by_its_square():
    """A peer multiplied gated outputs by the gate again, which ranks expert 0 first."""
    gates, norms = torch.tensor([0.9, 0.5, 0.1, 0.1]).double(), torch.tensor([1.0, 2.0, 1.0, 1.0]).double()
    saliency_E = scores.reap({"count": torch.full((4,), 3.0), "gated_norm": 3 * gates * norms})
    assert (gates**2 * norms).argmax() == 0
    assert ream(torch.ones(4, 4), saliency_E, 2, cap=3) == ((0,), (1, 2, 3))


def test_planted_clusters_are_found_by_every_grouping():
    """Four directions, four experts near each; the first of each is the most used."""
    owner_E = torch.arange(16) % 4
    mean_ED = torch.eye(4, dtype=torch.float64)[owner_E] + 0.02 * random(16, 4)
    usage_E = torch.where(torch.arange(16) < 4, 10.0, 1.0)
    expected = tuple((c, c + 4, c + 8, c + 12) for c in range(4))
    for linkage in LINKAGES:
        for cap in (None, 4):
            assert hierarchical(output_distance(mean_ED), 4, linkage=linkage, cap=cap, weight_E=usage_E) == expected
    assert m_smoe(output_cosine(mean_ED), usage_E, 4) == expected
    assert m_smoe(gaussian_logit_similarity(mean_ED @ mean_ED.T), usage_E, 4, cap=4) == expected
    assert ream(output_cosine(mean_ED), usage_E, 4, cap=4) == expected


@pytest.mark.parametrize("grouping", [m_smoe, ream, lambda d, w, n, cap: hierarchical(d, n, cap=cap, weight_E=w)])
def test_impossible_counts_and_caps_are_refused(grouping):
    with pytest.raises(ValueError, match="10 experts do not fit into 3 groups of at most 3: allow larger groups"):
        grouping(distances(10, 0), ones(10), 3, cap=3)
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"10 experts cannot form {count} groups"):
            grouping(distances(10, 0), ones(10), count, cap=16)


def test_distances_that_are_no_numbers_are_refused():
    mean_ED = random(6, 3)
    mean_ED[4] = torch.nan
    for matrix_EE in (output_distance(mean_ED), output_cosine(mean_ED)):
        with pytest.raises(ValueError, match=r"experts \[4\] to the others are not finite"):
            m_smoe(matrix_EE, ones(6), 3)
    with pytest.raises(ValueError, match="symmetric"):
        m_smoe(random(6, 6), ones(6), 3)


def test_groups_stay_inside_router_groups():
    shape = MoEShape(layer=0, num_experts=16, top_k=2, groups=4, groups_used=2)
    distance_EE, weight_E = distances(16, 1), random(16)
    groups = within_router_groups(lambda d, w, n: hierarchical(d, n, weight_E=w), distance_EE, weight_E, 8, 4)
    assert_groups(groups, 16, 8)
    assert all(len({e // 4 for e in group}) == 1 for group in groups)
    shape.require_ids(tuple(group[0] for group in groups))
    last = hierarchical(distance_EE[12:, 12:], 2, weight_E=weight_E[12:])
    assert groups[6:] == tuple(tuple(12 + e for e in group) for group in last)
    for count, router_groups in ((6, 4), (8, 3)):
        with pytest.raises(ValueError, match="every router group needs equally many"):
            within_router_groups(ream, distance_EE, weight_E, count, router_groups)
    assert within_router_groups(ream, distance_EE, weight_E, 8, 1) == ream(distance_EE, weight_E, 8)


def test_merging_duplicated_experts_loses_nothing():
    """Mixtral experts of which some are copies: the groups are the copies, and their weighted means are they."""
    view = moe_views(tiny.make("mixtral"))[0]
    source = [0, 1, 2, 0, 1, 5, 5, 0]
    with torch.no_grad():
        for parameter in view.stacks().values():
            parameter.copy_(parameter[source].clone())
    flat_EN = torch.cat([parameter.detach().flatten(1) for parameter in view.stacks().values()], dim=1)
    usage_E = torch.tensor([3.0, 1.0, 7.0, 5.0, 2.0, 4.0, 4.0, 6.0])
    expected = ((2,), (4, 1), (5, 6), (7, 0, 3))
    for linkage in LINKAGES:
        assert hierarchical(output_distance(flat_EN), 4, linkage=linkage, weight_E=usage_E) == expected
    for group in expected:
        share = usage_E[list(group)] / usage_E[list(group)].sum()
        merged_N = (share[:, None] * flat_EN[list(group)]).sum(0)
        for expert in group:
            torch.testing.assert_close(merged_N, flat_EN[expert], rtol=1e-6, atol=1e-7)


def test_more_groups_only_split_what_fewer_joined():
    distance_EE = distances(20, 3)
    for linkage in LINKAGES:
        found = [partition(hierarchical(distance_EE, n, linkage=linkage, weight_E=ones(20))) for n in range(1, 21)]
        for coarse, fine in pairwise(found):
            assert all(any(group <= whole for whole in coarse) for group in fine)
