"""Flat experts are held as stacks: they compute what stock transformers computes, and are stored as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.layer_info import get_moe_layer_info
from moe_compress.checkpoints.load import load_model
from moe_compress.edits.edits import KeepExperts
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES
from moe_compress.models.modeling.edited_model import conversions
from moe_compress.models.modeling.stacked_experts import StackedExperts, stack_experts
from support import readers, tiny
from support.editing import write

FLAT = [name for name, family in FAMILIES.items() if family.flat_experts]


@pytest.fixture
def stock(family_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """A model as stock transformers loads it."""
    return lambda family: AutoModelForCausalLM.from_pretrained(family_folder(family), dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FLAT)
def test_stacks_compute_what_flat_experts_do(family, stock):
    model, stacked = stock(family), stock(family)
    assert stack_experts(stacked, FAMILIES[family].flat_experts) and not stack_experts(stacked, ())
    pairs = [
        (before, after)
        for before, after in zip(hf.decoder_layers(model), hf.decoder_layers(stacked), strict=True)
        if any(isinstance(module, StackedExperts) for module in after.modules())
    ]
    assert len(pairs) == tiny.LAYERS
    x_BSD = torch.randn(2, 7, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    for before, after in pairs:
        name = next(n for n, module in after.named_modules() if isinstance(module, StackedExperts)).rpartition(".")[0]
        expected, found = (layer.get_submodule(name)(x_BSD) for layer in (before, after))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    ids = tiny.token_ids()
    assert (model(ids).logits - stacked(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", FLAT)
def test_a_loaded_model_is_saved_under_the_names_that_it_had(family, family_folder, tmp_path):
    model = load_model(family_folder(family), torch.float32)
    assert any(isinstance(module, StackedExperts) for module in model.modules())
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (family_folder(family), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FLAT)
def test_layers_with_other_counts_are_stored_flat_as_well(family, sources, tmp_path):
    """How many experts lie in a flat matrix, the edits of an edited checkpoint say."""
    checkpoint = write(sources(family), [KeepExperts(1, (0, 2, 5))], tmp_path)
    assert "moe_compress" in checkpoint.values
    rows = {
        (hf.layer_of(name), entry.shape[0])
        for name, entry in checkpoint.tensors.items()
        if name.endswith(FAMILIES[family].flat_experts)
    }
    assert rows == {(0, 8 * tiny.INNER), (1, 3 * tiny.INNER), (2, 8 * tiny.INNER)}


@pytest.mark.parametrize("family", FLAT)
def test_a_model_in_memory_is_analysed(family, stock):
    model = stock(family)
    assert get_moe_layer_info(model, 0).expert_params == 3 * tiny.HIDDEN * tiny.INNER
    compressor = ExpertCompressor(tiny.make(family, vocab_size=readers.VOCAB), readers.tokenizer())
    plan = compressor.plan_compression(1, target_experts=6)
    assert len(plan.survivors) == 6


def test_there_are_no_conversions_where_nothing_is_flat():
    assert conversions(()) == []
