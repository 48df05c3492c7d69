"""Compressors of tiny models with planted copies."""

from __future__ import annotations

import pytest

from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.layer_info import MoEHooks
from support import readers
from support.planted import LAYER, PROMPTS, plant, reader


@pytest.fixture(scope="module")
def tokenizer():
    return readers.tokenizer()


@pytest.fixture(scope="module")
def compressors(tokenizer):
    """family -> a compressor of a model with permuted copies (1 and 2, 5 and 6) in LAYER; not to be changed."""
    made = {}

    def make(family: str) -> ExpertCompressor:
        if family not in made:
            model = reader(family)
            plant(model, LAYER, 1, 2, permuted=True)
            plant(model, LAYER, 5, 6, permuted=True)
            made[family] = ExpertCompressor(model, tokenizer)
            made[family].analysis(LAYER, PROMPTS)
        return made[family]

    return make


@pytest.fixture
def fresh(tokenizer):
    """family -> a compressor of a model of its own, analysed on PROMPTS."""

    def make(family: str, **overrides) -> ExpertCompressor:
        compressor = ExpertCompressor(reader(family, **overrides), tokenizer)
        compressor.analysis(MoEHooks(compressor.model).moe_layer_indices[-1], PROMPTS)
        return compressor

    return make
