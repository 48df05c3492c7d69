"""Scores that come from samples of outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_compress.methods.expert_drop import subset_search
from moe_compress.methods.expert_drop.subset_search import best_subset, elimination_order, subset_losses
from moe_compress.models.shape import MoEShape
from support.output_samples import RULE_KINDS, made_up, naive_gates, probed


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_remove_one_is_the_change_without_one_expert(kind):
    found = made_up(kind)
    everyone = list(range(12))
    expected = [0.0] * 12
    for t in range(len(found.outputs_TED)):
        for e in naive_gates(found.output_sample.routing, found.output_sample.logits_TE[t].tolist(), everyone):
            change = found.added(t, everyone) - found.added(t, [other for other in everyone if other != e])
            expected[e] += float(change @ change) / len(found.outputs_TED)
    assert subset_search.remove_one(found.output_sample, found.shape).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in RULE_KINDS if kind not in ("softmax biased", "groups by two")])
def test_ranked_choice_is_an_election(kind):
    found = made_up(kind)
    rule, left, places = replace(found.output_sample.routing, scale=1.0), list(range(12)), [0.0] * 12
    for place in range(12):
        votes = dict.fromkeys(left, 0)
        for t in range(len(found.outputs_TED)):
            for e in naive_gates(rule, found.output_sample.logits_TE[t].tolist(), left):
                votes[e] += 1
        out = min(left, key=lambda e: (votes[e], e))
        places[out] = float(place)
        left.remove(out)
    assert subset_search.ranked_choice(found.output_sample).tolist() == places


def test_ranked_choice_needs_no_rule():
    found = made_up("softmax renormalised")
    expected = subset_search.ranked_choice(found.output_sample)
    assert torch.equal(subset_search.ranked_choice(replace(found.output_sample, routing=None)), expected)


def test_without_a_rule_nothing_can_be_told(family_checkpoint):
    sample = probed(family_checkpoint("phimoe"))[0]
    shape = MoEShape(layer=3, num_experts=8, top_k=2)
    for call in (lambda: best_subset(sample, shape, 4), lambda: elimination_order(sample, shape),
                 lambda: subset_search.remove_one(sample, shape)):  # fmt: skip
        with pytest.raises(ValueError, match="layer 3: its router follows no rule"):
            call()
    with pytest.raises(ValueError, match="this layer: its router"):
        subset_losses(sample, [(0, 1)])


def test_counts_that_cannot_be_are_refused():
    found = made_up("groups by two")
    with pytest.raises(ValueError, match="possible counts are 8, 12"):
        best_subset(found.output_sample, found.shape, 10)
