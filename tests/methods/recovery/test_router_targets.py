"""What the teacher's router says of the student's experts, beside sums of probabilities in float64."""

from __future__ import annotations

import pytest
import torch

from moe_compress.methods.recovery.router_targets import mapped_logits, router_kl
from support import naive_recovery as slow
from support.quantized import random

TEACHER = 2 * random(6, 8, seed=5).double()
# Of eight experts: all there, in another order; two gone; three merged with others and one gone.
PLACES = {"kept": [7, 6, 5, 4, 3, 2, 1, 0], "dropped": [0, -1, 1, 2, -1, 3, 4, 5], "merged": [0, 1, 0, -1, 1, 2, 0, 3]}
SCORES = ("softmax", "sigmoid")


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", PLACES)
def test_masses_of_merged_experts_add_up_and_those_of_dropped_ones_go_to_the_others(name, scores):
    place = PLACES[name]
    rows = 1 + max(place)
    found = mapped_logits(TEACHER, place, rows, scores)
    found = found.softmax(-1) if scores == "softmax" else found.sigmoid()
    expected = torch.tensor([slow.routing(each, place, rows, scores) for each in TEACHER], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", PLACES)
def test_the_routings_kl_is_that_of_its_formula(name, scores):
    place = PLACES[name]
    student = random(6, 1 + max(place), seed=6).double()
    wanted = [slow.routing(each, place, student.shape[1], scores) for each in TEACHER]
    found = router_kl(student, mapped_logits(TEACHER, place, student.shape[1], scores), scores)
    expected = [slow.router_kl(s, w, scores) for s, w in zip(student, wanted, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_logits_of_a_router_that_stayed_are_not_touched():
    assert mapped_logits(TEACHER, list(range(8)), 8, "softmax") is TEACHER


def test_sure_sigmoids_stay_finite():
    sure = torch.tensor([[60.0, 60.0, -60.0, -60.0]])
    found = mapped_logits(sure, [0, 0, 1, 1], 2, "sigmoid")
    assert bool(found.isfinite().all()) and bool(router_kl(-found, found, "sigmoid").isfinite().all())
