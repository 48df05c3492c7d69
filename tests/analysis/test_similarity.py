"""Similarity of experts at a known angle."""

from __future__ import annotations

import pytest

from moe_compress.analysis.layer_info import view_of
from moe_compress.analysis.similarity import aligned_cosine
from support import tiny


def test_experts_of_a_known_angle_have_that_similarity():
    view = view_of(tiny.make("mixtral"), 0)
    one, other = view.expert(0), view.expert(1)
    assert aligned_cosine(one, one) == pytest.approx(1) and aligned_cosine(one, other) < 0.6
    assert aligned_cosine(one, other) == pytest.approx(aligned_cosine(other, one))
