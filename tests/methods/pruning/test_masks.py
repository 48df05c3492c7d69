"""Masks take exactly so many weights, whatever is tied."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from moe_compress.methods.pruning import masks
from moe_compress.methods.pruning import prune as pruning
from moe_compress.methods.pruning.sparsegpt import sparsegpt
from moe_compress.methods.weight_method import MatrixGroup
from support import naive_pruning as slow
from support.pruned import random


@pytest.mark.parametrize("values", [10**6, 5, 2, 1], ids="{}-values".format)
def test_exactly_so_many_go_whatever_is_tied(values):
    score = (random(6, 40).abs() * values).floor() / values
    score[:, :7] = 0
    count = torch.tensor([0, 1, 7, 20, 39, 40])
    gone = masks.lowest(score, count)
    assert torch.equal(gone.sum(1), count)
    for row, mask in zip(score, gone, strict=True):
        assert not mask.any() or mask.all() or row[mask].max() <= row[~mask].min()
        tied = mask[row == row[mask].max()] if mask.any() else mask[:0]
        assert torch.equal(tied, tied.sort(descending=True, stable=True).values)  # of equal ones the first


@pytest.mark.parametrize("values", [10**6, 3])
def test_rows_lose_equally_many(values):
    score = (random(4, 5, 12, seed=1).abs() * values).floor()
    count = torch.tensor([0, 30, 33, 60])
    gone = masks.lowest_in_rows(score, count)
    assert gone.sum((1, 2)).tolist() == count.tolist()
    assert gone.sum(2).tolist() == [[0] * 5, [6] * 5, [7, 7, 7, 6, 6], [12] * 5]
    for row, mask in zip(score.flatten(0, 1), gone.flatten(0, 1), strict=True):
        assert not mask.any() or mask.all() or row[mask].max() <= row[~mask].min()
    if values > 3:
        assert torch.equal(gone[1], slow.in_rows(score[1], 0.5))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (1, 2), (3, 24)])
@pytest.mark.parametrize("values", [10**6, 2])
def test_groups_keep_their_highest(kept, group, values):
    score = (random(3, 5, 24, seed=2).abs() * values).floor()
    gone = masks.lowest_in_groups(score, kept, group)
    assert (gone.unflatten(2, (-1, group)).sum(3) == group - kept).all()
    for b in range(3):
        assert torch.equal(gone[b], slow.in_groups(score[b], kept, group))


@pytest.mark.parametrize("share", [None, 0.5])
def test_counts_are_where_the_scores_are(share, monkeypatch):
    """Without a GPU: on tensors that have a device and no values."""
    places = []

    def lowest(score: Tensor, count: Tensor) -> Tensor:
        places.append((score.device.type, count.device.type))
        return torch.zeros_like(score, dtype=torch.bool)

    monkeypatch.setattr(sys.modules[sparsegpt.__module__], "lowest", lowest)
    monkeypatch.setattr(sys.modules[sparsegpt.__module__], "inverse_factor", lambda gram, _names: (gram, []))
    sparsity_B = None if share is None else torch.full((2,), share, dtype=torch.float64)
    weights, gram = [torch.empty(2, 6, 8, device="meta")], torch.empty(2, 8, 8, device="meta")
    pruning.prune(MatrixGroup(["a", "b"], weights, gram, sparsity_B), method="sparsegpt", sparsity=0.5)
    assert places == [("meta", "meta")]
