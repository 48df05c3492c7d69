"""Errors of rows beside one number at a time."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.recovery.relative_error import mean_by_token, relative_error
from support.naive_recovery import hidden_error
from support.pruned import random


def test_each_row_is_held_against_its_own_size():
    ours, theirs = random(4, 5), random(4, 5, seed=1) * torch.tensor([1e-3, 1.0, 30.0, 1.0])[:, None]
    expected = [hidden_error(a, b) for a, b in zip(ours.double(), theirs.double(), strict=True)]
    assert relative_error(ours, theirs).tolist() == pytest.approx(expected, rel=1e-5)
    assert relative_error(ours.bfloat16(), theirs.bfloat16()).dtype == torch.float32


def test_a_row_that_should_be_nothing_has_a_finite_error():
    assert bool(relative_error(random(1, 3), torch.zeros(1, 3)).isfinite())


def test_tokens_weigh_the_same_however_many_rows_they_have():
    found = mean_by_token(torch.tensor([1.0, 5.0, 2.0, 3.0]), torch.tensor([2, 0, 2, 2]), 4)
    assert found.tolist() == [5.0, 0.0, 2.0, 0.0]
