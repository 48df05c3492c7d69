"""Divergences of next-token probabilities, beside the papers' formulas in float64."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.recovery.divergences import divergence_of
from support import naive_recovery as slow
from support.quantized import random

STUDENT, TEACHER = (3 * random(5, 11, seed=seed).double() for seed in (1, 2))
TINY = 1e-9
KINDS = ("forward", "reverse", "jsd")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_that_of_its_formula(kind, temperature):
    found = divergence_of(kind, temperature, 0.3)(STUDENT, TEACHER)
    expected = [slow.divergence(kind, s, t, temperature, 0.3) for s, t in zip(STUDENT, TEACHER, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_a_divergence_of_zero_from_itself(kind):
    assert float(divergence_of(kind, 2.0, 0.3)(TEACHER, TEACHER + 5).abs().max()) < 1e-12


def test_generalised_jensen_shannon_is_the_forward_kl_as_beta_nears_zero_and_the_reverse_as_it_nears_one():
    forward, reverse = (divergence_of(kind, 1.0, 0.5)(STUDENT, TEACHER) for kind in KINDS[:2])
    near = {beta: divergence_of("jsd", 1.0, beta)(STUDENT, TEACHER) for beta in (TINY, 1 - TINY)}
    torch.testing.assert_close(near[TINY] / TINY, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(near[1 - TINY] / TINY, reverse, rtol=1e-3, atol=0)


def test_the_gradient_of_the_forward_kl_is_t_times_the_difference_of_probabilities():
    """T^2 keeps it from fading as 1 / T^2 (Hinton et al.)."""
    logits = STUDENT.clone().requires_grad_()
    divergence_of("forward", 4.0, 0.5)(logits, TEACHER).sum().backward()
    expected = 4.0 * ((STUDENT / 4).softmax(-1) - (TEACHER / 4).softmax(-1))
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_sixteen_bits_are_summed_up_in_thirty_two(kind):
    """Over a large vocabulary sums of bf16 would be off by percents."""
    wide = [random(3, 50_000, seed=seed).bfloat16() for seed in (3, 4)]
    of = divergence_of(kind, 1.0, 0.3)
    found, exact = of(*wide), of(*(each.double() for each in wide))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_both_models_rule_out_count_nothing(kind):
    """As where a vocabulary is filled up to a round number."""
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[:, 3] = teacher[:, 3] = -torch.inf
    student.requires_grad_()
    found = divergence_of(kind, 1.0, 0.3)(student, teacher)
    left = [n for n in range(11) if n != 3]
    torch.testing.assert_close(found, divergence_of(kind, 1.0, 0.3)(STUDENT[:, left], TEACHER[:, left]))
    found.sum().backward()
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "temperature", "beta"),
    [("forward", 0.0, 0.5), ("reverse", -1.0, 0.5), ("jsd", float("nan"), 0.5), ("jsd", 1.0, 0.0), ("jsd", 1.0, 1.0)],
)
def test_a_temperature_or_beta_that_gives_no_divergence_is_refused(kind, temperature, beta):
    with pytest.raises(ValueError, match=r"^(temperature|beta)=.* is needed\.$"):
        divergence_of(kind, temperature, beta)
