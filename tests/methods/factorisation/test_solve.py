"""What holds for every structure: sizes kept, losses that never rise, the same numbers again, nothing seen at all."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from moe_compress.methods.factorisation import whitening
from moe_compress.methods.factorisation.sizes import Size, SizeOptions, parameters, size_for
from moe_compress.methods.factorisation.solve import SOLVERS, errors, solve
from support.experts import LazyGrams, experts, grams, loss

E, OUT, IN = 6, 16, 24
ALL = [*SOLVERS]
WIDE_AND_TALL = [(OUT, IN), (IN, OUT)]


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize(("outputs", "inputs"), WIDE_AND_TALL)
@pytest.mark.parametrize("plain", [True, False])
def test_losses_never_rise_and_are_what_the_factors_lose(
    structure: str, outputs: int, inputs: int, plain: bool
) -> None:
    weight, gram = experts(E, outputs, inputs, common=0.3), grams(E, inputs)
    size = size_for(structure, E, outputs, inputs, ratio=0.6)
    factors, losses = solve(structure, weight, None if plain else gram, size, sweeps=6)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    seen = torch.eye(inputs).expand(E, -1, -1) if plain else gram
    assert loss(weight, factors.dense(), seen) == pytest.approx(losses[-1], rel=1e-4)
    assert factors.parameters <= parameters(structure, size, E, outputs, inputs) <= 0.6 * E * outputs * inputs
    assert factors.dense().shape == weight.shape and factors.dense().dtype == torch.float32


@pytest.mark.parametrize("structure", ALL)
def test_the_same_again_and_read_lazily(structure: str) -> None:
    weight, gram = experts(E, OUT, IN).float(), grams(E, IN).float()
    size = size_for(structure, E, OUT, IN, ratio=0.6)
    first, again, lazily = (solve(structure, weight, of, size)[0].dense() for of in (gram, gram, LazyGrams(gram)))
    assert torch.equal(first, again) and torch.equal(first, lazily)


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize(("outputs", "inputs"), WIDE_AND_TALL)
def test_experts_that_saw_nothing(structure: str, outputs: int, inputs: int) -> None:
    weight, gram = experts(E, outputs, inputs, common=0.5), grams(E, inputs)
    size = size_for(structure, E, outputs, inputs, ratio=0.6)
    others = solve(structure, weight, gram, size)[0]
    gram[2] = 0
    factors, losses = solve(structure, weight, gram, size)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert errors(weight[2:3], _only(factors.expert(2)), None)[0] < 0.6
    assert factors.dense().isfinite().all() and others.dense().isfinite().all()
    nothing, _ = solve(structure, weight, torch.zeros_like(gram), size)
    plain, _ = solve(structure, weight, None, size)
    torch.testing.assert_close(nothing.dense(), plain.dense(), rtol=1e-3, atol=1e-3)


def _only(matrix: torch.Tensor) -> object:
    class One:
        def expert(self, e: int) -> torch.Tensor:
            return matrix

    return One()


@pytest.mark.parametrize("structure", ALL)
def test_few_bits_and_large_and_small_numbers(structure: str) -> None:
    weight, gram = experts(E, OUT, IN, common=0.5), grams(E, IN)
    size = size_for(structure, E, OUT, IN, ratio=0.6)
    expected = errors(weight, solve(structure, weight, gram, size)[0], gram)
    bits = solve(structure, weight.bfloat16(), gram, size)[0]
    assert errors(weight, bits, gram) == pytest.approx(expected, rel=0.02)
    scaled = solve(structure, weight * 1e-3, gram * 1e6, size)[0]
    assert errors(weight * 1e-3, scaled, gram) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("structure", ALL)
def test_grams_of_fewer_tokens_than_inputs(structure: str) -> None:
    weight = experts(E, OUT, IN, common=0.5)
    tokens = torch.randn(E, 5, IN, generator=torch.Generator().manual_seed(2))
    gram = tokens.transpose(1, 2) @ tokens
    size = size_for(structure, E, OUT, IN, ratio=0.6)
    factors, losses = solve(structure, weight, gram, size)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    plain, white = errors(weight, factors, gram)
    assert white < 0.35 and plain < 10


@pytest.mark.parametrize("structure", ALL)
def test_experts_that_are_all_zero(structure: str) -> None:
    weight, gram = torch.zeros(E, OUT, IN), grams(E, IN)
    factors, _ = solve(structure, weight, gram, size_for(structure, E, OUT, IN, ratio=0.6))
    assert errors(weight, factors, gram) == (0.0, 0.0) and bool((factors.dense() == 0).all())


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize(("outputs", "inputs"), WIDE_AND_TALL)
def test_in_fp32_as_in_float64(structure: str, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large matrices and devices take."""
    weight, gram = experts(E, outputs, inputs, common=0.3).float(), grams(E, inputs, power=1.5).float()
    size = size_for(structure, E, outputs, inputs, ratio=0.6)
    expected = solve(structure, weight, gram, size)[1]
    monkeypatch.setattr(whitening, "SMALL", 0)
    factors, losses = solve(structure, weight, gram, size)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert loss(weight, factors.dense(), gram) == pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize("structure", ALL)
def test_no_expert_s_gram_is_kept(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the Grams for the pooled one and one a sweep, but for what moves shared bases and cores."""
    weight, gram = experts(E, OUT, IN, common=0.3), LazyGrams(grams(E, IN))
    held: list[weakref.ref[torch.Tensor]] = []
    ridged = whitening.Metrics._ridged

    def watched(metrics: whitening.Metrics, e: int) -> torch.Tensor | None:
        found = ridged(metrics, e)
        assert found is not None
        held.append(weakref.ref(found))
        assert sum(one() is not None for one in held) <= 3
        return found

    monkeypatch.setattr(whitening.Metrics, "_ridged", watched)
    solve(structure, weight, gram, size_for(structure, E, OUT, IN, ratio=0.6), sweeps=2)
    most = {"svd": 1, "sparse_low_rank": 1, "base_delta": 4, "shared_basis": 7, "basis_mixture": 7, "wrapper": 13}
    assert gram.reads <= most[structure] * E


def test_shared_outputs_too() -> None:
    weight, gram = experts(E, IN, OUT, common=0.5), grams(E, OUT)
    size = size_for("shared_basis", E, IN, OUT, ratio=0.5, options=SizeOptions(side="out"))
    factors, losses = solve("shared_basis", weight, gram, size)
    assert loss(weight, factors.dense(), gram) == pytest.approx(losses[-1], rel=1e-4)
    assert factors.parameters == parameters("shared_basis", size, E, IN, OUT) <= 0.5 * weight.numel()


def test_what_cannot_be_solved_is_refused() -> None:
    weight, gram = experts(E, OUT, IN), grams(E, IN)
    size = size_for("svd", E, OUT, IN, rank=2)
    with pytest.raises(ValueError, match=r"structure=tucker: allowed: svd, base_delta"):
        solve("tucker", weight, gram, size)
    with pytest.raises(ValueError, match="6 experts need as many Gram matrices, not 5"):
        solve("svd", weight, gram[:5], size)
    with pytest.raises(ValueError, match=r"Gram matrix of expert 0 is \[16, 16\] for 24 inputs"):
        solve("svd", weight, grams(E, OUT), size)
    with pytest.raises(ValueError, match=r"svd of 6 experts 16 x 24 needs a rank of 0\.\.16 for each: ranks=\[2\]"):
        solve("svd", weight, gram, Size(ranks=[2]))
    with pytest.raises(ValueError, match=r"shared_basis of 6 experts 16 x 24 needs a rank of 1\.\.24: rank=0"):
        solve("shared_basis", weight, gram, Size())
    gram[3, 4, 4] = torch.nan
    with pytest.raises(ValueError, match="expert 3 holds NaN"):
        solve("svd", weight, gram, size)
    weight[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="weights hold NaN or infinity"):
        solve("svd", weight, None, size)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_meanwhile_and_as_before_afterwards(allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with pytest.raises(KeyError), whitening.full_precision():
            assert not matmul.allow_tf32
            raise KeyError
        assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = before
