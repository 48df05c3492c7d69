"""SparseGPT is that of the paper, where inputs are dead and rows few too."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_compress.methods.column_solver import inverse_factor
from moe_compress.methods.pruning.sparsegpt import sparsegpt
from support import naive_pruning as slow
from support.pruned import random


def pruned_both_ways(
    weights: list[Tensor], x: Tensor, share: Tensor, pattern: tuple[int, int] | None
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """[expert][matrix] -> (the package's weights, the reference's weights, its mask)."""
    gram = torch.stack([(one.double().T @ one.double()).float() for one in x])
    found, raised = sparsegpt(weights, gram, share, pattern, [f"expert {e}" for e in range(len(x))])
    assert raised == []
    return [
        [
            (new[e], *slow.sparsegpt(old[e], one, pattern or float(share[e])))
            for old, new in zip(weights, found, strict=True)
        ]
        for e, one in enumerate(x)
    ]


def require_same(found: list[list[tuple[Tensor, Tensor, Tensor]]], mistaken: int = 0) -> None:
    """The same masks and weights; a near tie may fall the other way in `mistaken` of the output rows."""
    for new, expected, mask in itertools.chain.from_iterable(found):
        assert new.dtype == torch.float32
        right = ((new == 0) == (expected == 0)).all(1)
        assert int((~right).sum()) <= mistaken
        assert torch.equal((expected == 0), mask) or bool((expected == 0)[mask].all())
        torch.testing.assert_close(new[right].double(), expected[right], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (1, 4)], ids=str)
@pytest.mark.parametrize("inputs", [24, 128, 200])
def test_sparsegpt_is_that_of_the_paper(inputs, pattern):
    x = random(2, 3 * inputs, inputs, seed=3) @ (torch.eye(inputs) + 0.3 * random(inputs, inputs, seed=4))
    weights = [random(2, 6, inputs, seed=5), random(2, 9, inputs, seed=6)]
    require_same(pruned_both_ways(weights, x, torch.tensor([0.5, 0.5]), pattern), mistaken=1)


@pytest.mark.parametrize("inputs", [40, 160])
def test_sparsegpt_with_a_share_for_each_expert(inputs):
    share = torch.tensor([0.0, 0.1, 0.37, 0.9], dtype=torch.float64)
    x, weights = random(4, 2 * inputs, inputs, seed=7), [random(4, 7, inputs, seed=8), random(4, 5, inputs, seed=9)]
    found = pruned_both_ways(weights, x, share, None)
    require_same(found, mistaken=1)
    for one, part in zip(found, share.tolist(), strict=True):
        assert [int((new == 0).sum()) for new, _, _ in one] == [round(part * len(new) * inputs) for new, _, _ in one]
    assert all(torch.equal(new, weight[0]) for (new, _, _), weight in zip(found[0], weights, strict=True))


@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=str)
def test_sparsegpt_where_inputs_are_dead_or_rows_few(pattern):
    x, weights = random(3, 40, 32, seed=10), [random(3, 8, 32, seed=11)]
    x[0, :, [3, 4, 5, 17]] = 0
    x[1, 12:] = 0  # a Gram matrix of rank 12
    x[2] = 0
    found = pruned_both_ways(weights, x, torch.full((3,), 0.5), pattern)
    require_same(found[:2], mistaken=1)  # of the third, whose weights all cost nothing, any may go
    for (new, _, mask), dead in zip(itertools.chain.from_iterable(found), (x == 0).all(1), strict=True):
        assert int((new == 0).sum()) == int(mask.sum()) == mask.numel() // 2
        assert pattern or bool(mask[:, dead].all()) or bool(dead.all())


def test_what_is_never_used_goes_before_anything_else():
    """Even the largest weights, and without a trace: nothing has to make up for them."""
    x, weight = random(1, 60, 16, seed=12), random(1, 6, 16, seed=13)
    x[..., 5] = 0
    weight[..., 5] = 100
    found, _ = sparsegpt([weight], x.transpose(1, 2) @ x, torch.tensor([1 / 16]), None, ["it"])
    expected = weight.clone()
    expected[..., 5] = 0
    torch.testing.assert_close(found[0], expected)


def test_what_is_pruned_together_is_pruned_as_if_alone():
    x, weights = random(3, 90, 48, seed=14), [random(3, 6, 48, seed=15), random(3, 10, 48, seed=16)]
    gram, share = x.transpose(1, 2) @ x, torch.full((3,), 0.4)
    both, _ = sparsegpt(weights, gram, share, None, ["a", "b", "c"])
    for weight, together in zip(weights, both, strict=True):
        for e in range(3):
            (alone,), _ = sparsegpt([weight[e : e + 1]], gram[e : e + 1], share[:1], None, ["a"])
            torch.testing.assert_close(together[e], alone[0], rtol=1e-4, atol=1e-5)


def test_making_up_for_what_is_lost_pays():
    x = random(300, 16, seed=17) @ random(16, 64, seed=18) + 0.3 * random(300, 64, seed=19)
    weight = random(12, 64, seed=20)
    (new,), _ = sparsegpt([weight[None]], (x.T @ x)[None], torch.tensor([0.5]), None, ["it"])
    masked = weight.masked_fill(slow.wanda(weight, x, 0.5), 0)
    assert slow.loss(weight, new[0], x) < 0.5 * slow.loss(weight, masked, x)


def test_damping_is_raised_once_and_said():
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[1, 0, 0] = -0.05  # not definite with a damping of 0.01, definite with 0.1
    factor, raised = inverse_factor(gram, ["a", "b", "c"])
    assert raised == [1]
    damping = 0.1 * gram[1].diagonal().mean()
    inverse = torch.linalg.inv(gram[1] + damping * torch.eye(8))
    torch.testing.assert_close(factor[1].T @ factor[1], inverse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor[0].T @ factor[0], torch.eye(8) / 1.01)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5.0])
def test_a_gram_matrix_that_nothing_saves(wrong):
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[2, 4, 4] = wrong
    names = [f"expert {e} of layer 7" for e in range(3)]
    with pytest.raises(ValueError, match="the Gram matrix of expert 2 of layer 7 is singular or holds NaN"):
        sparsegpt([random(3, 4, 8)], gram, torch.full((3,), 0.5), None, names)
