"""Searching for the set to keep, on layers made up: one token at a time, afresh, and by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moe_compress.methods.expert_drop import subset_search
from moe_compress.methods.expert_drop.subset_loss import SubsetLoss, SubsetSearch
from moe_compress.methods.expert_drop.subset_search import best_subset, elimination_order, subset_losses
from moe_compress.models.router_rule import RouterRule
from moe_compress.models.shape import MoEShape
from support.output_samples import RULE_KINDS, Made, made_up, naive_gates, output_sample_of, sets_of, target
from support.slow import slow_after


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_losses_equal_one_token_at_a_time(kind):
    found = made_up(kind)
    sets = [kept for keep in (8, 12) for kept in sets_of(found.shape, keep)[::40]]
    expected = [found.loss(list(kept)) for kept in sets]
    assert subset_losses(found.output_sample, sets).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("kind", slow_after(1, tuple(RULE_KINDS)))
def test_losses_do_not_depend_on_chunks(kind, monkeypatch):
    found = made_up(kind)
    sets = sets_of(found.shape, 8)
    whole, order = subset_losses(found.output_sample, sets), elimination_order(found.output_sample, found.shape)
    monkeypatch.setattr("moe_compress.methods.expert_drop.subset_loss.CHUNK", 100)
    torch.testing.assert_close(subset_losses(found.output_sample, sets), whole, rtol=1e-12, atol=0)
    again = elimination_order(found.output_sample, found.shape)
    assert [ids for ids, _ in again] == [ids for ids, _ in order]


EXACT_STEPS = [kind for kind in RULE_KINDS if kind != "softmax biased"]


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_every_step_of_the_search_is_what_starting_afresh_gives(kind):
    """The loss itself always; what removing each single expert would give, where that is promised to be exact."""
    found = made_up(kind, experts=24, tokens=60)
    layer = SubsetLoss(found.output_sample)
    search = SubsetSearch(layer)
    size = 24 // found.shape.groups
    for expert in sorted(range(24), key=lambda e: e % size)[: 24 - found.shape.floor]:
        search.remove(expert)
        losses, scale = search.losses(), float(layer.target)
        assert float(losses[-1]) / scale == pytest.approx(
            float(layer.losses(search.alive_E[None])[0]) / scale, rel=1e-9
        )
        if kind in EXACT_STEPS:
            left = search.alive_E.nonzero().flatten()
            without = search.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
            torch.testing.assert_close(losses[left], layer.losses(without)[0], rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("kind", [kind for kind in EXACT_STEPS if "groups" not in kind])
def test_an_expert_that_comes_back_leaves_the_search_as_if_it_had_stayed(kind):
    found = made_up(kind, experts=24, tokens=60)
    search = SubsetSearch(SubsetLoss(found.output_sample))
    for expert in range(0, 20, 2):
        search.remove(expert)
    for expert in range(0, 20, 2):
        trial = search.with_expert(expert)
        left = trial.alive_E.nonzero().flatten()
        without = trial.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
        expected = trial.layer.losses(without)[0]
        torch.testing.assert_close(trial.losses()[left], expected, rtol=1e-9, atol=0)
        assert not search.alive_E[expert]


@pytest.mark.parametrize("kind", slow_after(1, tuple(RULE_KINDS)))
def test_greedy_elimination_takes_the_best_step_each_time(kind):
    found = made_up(kind)
    path = elimination_order(found.output_sample, found.shape)
    assert len(path) == (found.shape.num_experts - found.shape.floor) // found.shape.groups
    left = list(range(found.shape.num_experts))
    size = len(left) // found.shape.groups
    for gone, loss in path:
        assert [e // size for e in gone] == list(range(found.shape.groups))
        for expert in gone:
            members = [e for e in left if e // size == expert // size]
            steps = {e: found.loss([other for other in left if other != e]) for e in members}
            if kind in EXACT_STEPS:
                assert expert == min(steps, key=lambda e: steps[e])
            left.remove(expert)
        assert loss == pytest.approx(found.loss(left), rel=1e-9)


@pytest.mark.parametrize("kind", slow_after(1, tuple(RULE_KINDS)))
def test_greedy_and_swaps_come_close_to_the_optimum(kind):
    """Never worse than greedy alone, and mostly the best of all sets or close to it; with groups of three, where
    only experts of one group change places, there are more sets from which no swap leads on."""
    gaps = []
    for seed in range(6):
        found = made_up(kind, seed=seed)
        path = [loss for _, loss in elimination_order(found.output_sample, found.shape)]
        for keep in (8, 4) if found.shape.floor <= 4 else (8,):
            exact = best_subset(found.output_sample, found.shape, keep)
            quick = best_subset(found.output_sample, found.shape, keep, exact_up_to=0)
            everything = subset_losses(found.output_sample, sets_of(found.shape, keep))
            assert exact.loss == pytest.approx(float(everything.min()), rel=1e-12)
            greedy = path[(12 - keep) // found.shape.groups - 1]
            assert exact.loss * (1 - 1e-9) <= quick.loss <= greedy * (1 + 1e-9)
            assert quick.loss == pytest.approx(found.loss(list(quick.kept)), rel=1e-9)
            found.shape.require_ids(quick.kept)
            gaps.append(quick.loss / exact.loss - 1)
    assert sum(gaps) / len(gaps) < (0.02 if found.shape.groups == 1 else 0.06)
    assert sum(gap < 1e-9 for gap in gaps) >= len(gaps) / (2 if found.shape.groups == 1 else 3)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_swaps_lead_from_a_bad_set_to_one_that_no_swap_improves(kind):
    found = made_up(kind, experts=24, tokens=60)
    layer, size = SubsetLoss(found.output_sample), 24 // found.shape.groups
    search = SubsetSearch(layer)
    for expert in [e for e in range(24) if e % size < size // 2]:
        search.remove(expert)
    start = float(search.losses()[-1])
    better = subset_search._swap(search, found.shape)
    loss = float(better.losses()[-1])
    assert loss < 0.99 * start
    assert loss == pytest.approx(float(layer.losses(better.alive_E[None])[0]), rel=1e-9)
    kept, gone = (mask.nonzero().flatten().tolist() for mask in (better.alive_E, ~better.alive_E))
    found.shape.require_ids(tuple(kept))
    swaps = []
    for new, old in itertools.product(gone, kept):
        if new // size == old // size:
            swaps.append([e for e in kept if e != old] + [new])
    best = float(subset_losses(found.output_sample, swaps).min()) ** 2 * float(layer.target)
    exact = found.shape.groups == 1 and kind in EXACT_STEPS
    assert best >= loss * (1 - (1e-9 if exact else 0.05))


def test_a_swap_that_greedy_cannot_see_is_found():
    """Where experts are blends of a few vectors, greedy drops some that it misses later."""
    gains = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        logits_TE = torch.randn(50, 20, generator=generator, dtype=torch.float64)
        base = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        mix = torch.rand(20, 4, generator=generator, dtype=torch.float64)
        outputs_TED = (mix @ base).expand(50, -1, -1).contiguous()
        rule = RouterRule(top_k=2, scores="softmax", renormalised=True)
        target_TD = torch.stack(
            [
                sum(g * outputs_TED[t, e] for e, g in naive_gates(rule, logits_TE[t].tolist(), list(range(20))).items())
                for t in range(50)
            ]
        )
        sample = output_sample_of(logits_TE, outputs_TED, target_TD, rule)
        shape = MoEShape(layer=0, num_experts=20, top_k=2)
        greedy = dict(zip(range(19, 1, -1), (loss for _, loss in elimination_order(sample, shape)), strict=True))
        gains.append(1 - best_subset(sample, shape, 6).loss / greedy[6])
    assert min(gains) >= -1e-9 and max(gains) > 0.005


@pytest.mark.parametrize("kind", ["softmax renormalised", "softmax", "groups by two"])
def test_experts_that_a_token_ranks_too_low_add_nothing_and_are_counted(kind):
    found = made_up(kind, ranked=5)
    for kept in sets_of(found.shape, 8)[::60]:
        choice = float(subset_losses(found.output_sample, [kept])[0])
        assert choice == pytest.approx(found.loss(list(kept), unknown=True), rel=1e-9)
    choice = best_subset(found.output_sample, found.shape, 8, exact_up_to=0)
    short = 0
    for t in range(len(found.outputs_TED)):
        gates = naive_gates(found.output_sample.routing, found.output_sample.logits_TE[t].tolist(), list(choice.kept))
        short += not set(gates) <= set(found.output_sample.ids_TM[t].tolist())
    assert choice.exhausted == pytest.approx(short / len(found.outputs_TED)) and short > 0


def test_very_sharp_gates_stay_finite():
    """A softmax that leaves nothing to anybody else: without its one expert a token's gates are the others'."""
    found = made_up("softmax")
    sample = replace(found.output_sample, logits_TE=found.output_sample.logits_TE * 60)
    sharp = Made(found.shape, sample, found.outputs_TED)
    layer, search = SubsetLoss(sample), SubsetSearch(SubsetLoss(sample))
    for expert in (3, 7, 1):
        search.remove(expert)
        left = search.alive_E.nonzero().flatten()
        without = search.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
        torch.testing.assert_close(search.losses()[left], layer.losses(without)[0], rtol=1e-9, atol=0)
    kept = search.alive_E.nonzero().flatten().tolist()
    expected = sum(float((sharp.added(t, kept) - target(found, t)).square().sum()) for t in range(40))
    assert float(search.losses()[-1]) == pytest.approx(expected, rel=1e-9)
