"""Sums of outer products: by blocks on one side of the diagonal, and whole at the end."""

from __future__ import annotations

import pytest
import torch

from moe_compress.calibration.input_moments import RunningSums


@pytest.mark.parametrize("inputs", [96, 300, 513])
@pytest.mark.parametrize("paired", [False, True])
def test_gram_matrices_are_those_of_all_rows(inputs, paired):
    x_RI, y_RI = torch.randn(2, 60, inputs)
    group_R = torch.arange(60) % 3
    sums = RunningSums(3, inputs, "input_grams", torch.device("cpu"))
    for part in (slice(0, 25), slice(25, 60)):
        order = group_R[part].argsort(stable=True)
        other_RI = y_RI[part][order] if paired else None
        sums.add(x_RI[part][order], group_R[part][order], other_RI)
    sums.finish()
    for group in range(3):
        mine = group_R == group
        expected = x_RI[mine].double().T @ (y_RI if paired else x_RI)[mine].double()
        torch.testing.assert_close(sums.total[group].double(), expected, rtol=1e-5, atol=1e-4)
        assert paired or torch.equal(sums.total[group], sums.total[group].T)
