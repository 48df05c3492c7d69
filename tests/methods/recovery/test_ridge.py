"""The ridge regression of a router, beside the least squares of the same problem written out."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.recovery.ridge import ridge_step
from support.quantized import random

INPUTS, RESIDUAL = random(40, 6, seed=1).double(), random(40, 3, seed=2).double()


@pytest.mark.parametrize("offset", [False, True])
def test_it_is_the_least_squares_of_the_problem_with_a_row_for_each_penalty(offset):
    """Penalties are rows of sqrt(r m); the offset, a column of ones, has none."""
    ridge = 0.05
    weight = ridge * float(INPUTS.square().sum(0).mean())
    ones, zeros = ([torch.full((n, 1), float(n == 40)).double()] * offset for n in (40, 6))
    rows = torch.cat([torch.cat([INPUTS, *ones], 1), torch.cat([weight**0.5 * torch.eye(6).double(), *zeros], 1)])
    expected = torch.linalg.lstsq(rows, torch.cat([RESIDUAL, torch.zeros(6, 3).double()])).solution
    weight_ED, bias_E = ridge_step(INPUTS, RESIDUAL, ridge, offset=offset)
    torch.testing.assert_close(weight_ED, expected[:6].T, rtol=1e-9, atol=1e-12)
    assert (bias_E is None) != offset
    if bias_E is not None:
        torch.testing.assert_close(bias_E, expected[6], rtol=1e-9, atol=1e-12)


def test_what_a_linear_map_left_out_is_found_again():
    missing = random(3, 6, seed=3).double()
    found, _ = ridge_step(INPUTS, INPUTS @ missing.T, 1e-9, offset=False)
    torch.testing.assert_close(found, missing, rtol=1e-6, atol=1e-8)


def test_fewer_tokens_than_inputs_give_a_finite_answer():
    found, offset = ridge_step(INPUTS[:3], RESIDUAL[:3], 1e-3, offset=True)
    assert bool(found.isfinite().all()) and offset is not None and bool(offset.isfinite().all())


def test_inputs_in_single_precision_are_summed_up_in_double():
    near = INPUTS.float() * 1e-3 + 10.0  # nearly alike: products of single precision would lose what differs
    found, _ = ridge_step(near, RESIDUAL.float(), 1e-6, offset=True)
    exact, _ = ridge_step(near.double(), RESIDUAL.float().double(), 1e-6, offset=True)
    torch.testing.assert_close(found, exact)
