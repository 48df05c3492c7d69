"""The best low rank as inputs see it, against a full decomposition in float64 and against chance."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.factorisation.low_rank import spectrum, truncated
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import solve
from moe_compress.methods.factorisation.whitening import Metric
from support.experts import experts, grams, loss


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_full_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, gram = experts(1, *shape)[0], grams(1, shape[1])[0]
    value = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))
    metric = Metric(gram.to(dtype))
    torch.testing.assert_close(spectrum(weight.to(dtype), metric).double(), value**2, rtol=1e-4, atol=1e-4)
    for rank in (0, 1, 5, 16):
        left, right = truncated(weight.to(dtype), rank, metric)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1]) and left.dtype == dtype
        assert loss(weight[None], (left @ right)[None], gram[None]) == pytest.approx(
            float((value[rank:] ** 2).sum()), rel=1e-4, abs=1e-3
        )


def test_no_step_aside_is_better() -> None:
    weight, gram = experts(3, 16, 24), grams(3, 24)
    factors, losses = solve("svd", weight, gram, Size(ranks=[2, 4, 6]))
    assert [left.shape[1] for left in factors.left] == [2, 4, 6]
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        moved = torch.stack(
            [
                (left + 0.01 * torch.randn(left.shape, generator=generator)) @ right
                for left, right in zip(factors.left, factors.right, strict=True)
            ]
        )
        assert loss(weight, moved, gram) > losses[-1]


def test_ill_conditioned_inputs_are_taken_in_float64() -> None:
    weight, gram = experts(1, 24, 16)[0], grams(1, 16, power=7.0)[0]
    assert Metric(gram).ill_conditioned and not Metric(grams(1, 16)[0]).ill_conditioned
    left, right = truncated(weight.float(), 4, Metric(gram))
    value = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))
    least = float((value[4:] ** 2).sum())
    # The factors are fp32 again: what they lose beside the optimum is their rounding.
    assert loss(weight[None], (left.double() @ right.double())[None], gram[None]) == pytest.approx(least, rel=1e-3)


def test_a_gram_that_rounding_made_indefinite_is_repaired() -> None:
    gram = grams(1, 16)[0]
    value, vector = torch.linalg.eigh(gram)
    value[0] = -1e-9
    metric = Metric(vector * value @ vector.T)
    assert metric.lower_II is not None and metric.lower_II.isfinite().all()
