"""Distances and similarities between experts are those of the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moe_compress.methods.expert_merge.grouping import hierarchical, m_smoe, m_smoe_counts
from moe_compress.methods.expert_merge.similarity import (
    gaussian_logit_similarity,
    jaccard,
    logit_cosine,
    output_cosine,
    output_distance,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, experts: int = 16) -> Tensor:
    logits_TE = random(50, experts, seed=seed)
    return logits_TE.T @ logits_TE


def filled(experts: int, entry: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[entry(a, b) for b in range(experts)] for a in range(experts)], dtype=torch.float64)


def test_distances_are_those_of_the_formulas():
    logits_TE, mean_ED = random(50, 6), random(6, 9, seed=1)
    columns, rows = logits_TE.T.tolist(), mean_ED.tolist()
    cosine = filled(6, lambda a, b: float(cosine_similarity(logits_TE[:, a], logits_TE[:, b], dim=0)))
    torch.testing.assert_close(logit_cosine(logits_TE.T @ logits_TE), cosine)
    cosine = filled(6, lambda a, b: float(cosine_similarity(mean_ED[a], mean_ED[b], dim=0)))
    torch.testing.assert_close(output_cosine(mean_ED), cosine)
    euclidean = filled(6, lambda a, b: math.dist(rows[a], rows[b]))
    torch.testing.assert_close(output_distance(mean_ED), euclidean)
    torch.testing.assert_close(output_distance(mean_ED), euclidean)
    apart = sorted(math.dist(columns[a], columns[b]) for a in range(6) for b in range(a))
    middle = apart[(len(apart) - 1) // 2]
    gaussian = filled(6, lambda a, b: math.exp(-(math.dist(columns[a], columns[b]) ** 2) / (2 * middle**2)))
    torch.testing.assert_close(gaussian_logit_similarity(logits_TE.T @ logits_TE), gaussian)


def test_the_gaussian_ignores_what_a_token_adds_to_all_its_logits():
    logits_TE = random(50, 6)
    shifted_TE = logits_TE + 3 * random(50, 1, seed=1)
    got = gaussian_logit_similarity(3 * shifted_TE.T @ shifted_TE)
    torch.testing.assert_close(got, gaussian_logit_similarity(logits_TE.T @ logits_TE))


def test_equal_logits_are_equal_in_spite_of_rounding():
    noise_EE = 1e-15 * random(8, 8)
    similarity_EE = gaussian_logit_similarity(1e3 * torch.ones(8, 8) * (1 + noise_EE + noise_EE.T))
    assert similarity_EE.eq(1).all()


def test_jaccard_is_both_over_either():
    chosen = [[0, 1], [0, 1], [1, 2], [0, 2]]
    hot_TE = torch.zeros(4, 4).scatter_(1, torch.tensor(chosen), 1.0)
    sets = [{t for t, ids in enumerate(chosen) if e in ids} for e in range(4)]
    expected = filled(4, lambda a, b: 1.0 if a == b else len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])))
    torch.testing.assert_close(jaccard(hot_TE.T @ hot_TE, hot_TE.sum(0)), expected)


def test_equal_experts_are_at_distance_zero_and_silent_ones_are_no_trouble():
    mean_ED = 1e4 + random(3, 300, seed=5)[[0, 1, 0, 2, 1]]
    for distance_EE in (output_distance(mean_ED),):
        assert distance_EE[0, 2] == distance_EE[1, 4] == 0 and distance_EE[0, 1] > 1
        assert hierarchical(distance_EE, 3, weight_E=torch.ones(5)) == ((0, 2), (1, 4), (3,))
    assert gaussian_logit_similarity(mean_ED @ mean_ED.T)[0, 2] == 1
    assert gaussian_logit_similarity(torch.ones(4, 4)).eq(1).all() and gaussian_logit_similarity(torch.ones(1, 1)) == 1
    mean_ED[3] = 0
    assert output_cosine(mean_ED)[3].tolist() == [0, 0, 0, 1, 0]


def test_statistics_add_up_over_batches_of_any_size():
    """A peer's baseline kept the similarity of the last batch only, and normalised usage batch by batch."""
    logits_TE = random(90, 8)
    chosen_TE = (logits_TE > 0.5).double()
    batches = torch.arange(90).split([5, 80, 5])
    logit_gram_EE = sum(logits_TE[b].T @ logits_TE[b] for b in batches)
    both_EE, count_E = (sum(f(chosen_TE[b]) for b in batches) for f in (lambda c: c.T @ c, lambda c: c.sum(0)))
    whole = [logit_cosine(logits_TE.T @ logits_TE), jaccard(chosen_TE.T @ chosen_TE, chosen_TE.sum(0))]
    for got, expected in zip([logit_cosine(logit_gram_EE), jaccard(both_EE, count_E)], whole, strict=True):
        torch.testing.assert_close(got, expected)
    assert m_smoe(logit_cosine(logit_gram_EE), count_E, 3) == m_smoe(whole[0], chosen_TE.sum(0), 3)
    usage = {0: torch.tensor([60.0, 40.0]), 1: torch.tensor([70.0, 50.0])}
    other_size = {0: usage[0] * 7, 1: usage[1]}
    assert m_smoe_counts(usage, 3, {0: 1, 1: 1}) == m_smoe_counts(other_size, 3, {0: 1, 1: 1}) == {0: 1, 1: 2}
