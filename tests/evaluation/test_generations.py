"""Generations side by side: how much two of them overlap, and prompts that predict nothing."""

from __future__ import annotations

import pytest

import moe_compress
from moe_compress.evaluation.generations import token_overlap


def test_prompts_of_one_token_predict_nothing(reader_folder, options, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    model = reader_folder("mixtral")
    with pytest.raises(ValueError, match="every prompt is a single token, which predicts nothing"):
        moe_compress.compare(model, model, prompts=tmp_path / "prompts.txt", **options)


def test_token_overlap():
    assert token_overlap([1, 2, 3], [1, 2, 3]) == (1.0, 3)
    assert token_overlap([1, 2, 3, 4], [1, 9, 3]) == (0.5, 1)
    assert token_overlap([], []) == (1.0, 0) and token_overlap([], [1]) == (0.0, 0)
