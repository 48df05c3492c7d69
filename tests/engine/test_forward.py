"""The engine is exact: layer by layer is the full forward, on every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.models import hf
from support import tiny
from support.slow import slow_families
from support.tiny import CPU, windows_of

# Largest distance from stock logits of about 4: DBRX's own loop over flat experts multiplies in another order than
# stacks of them do.
ROUNDING = {"dbrx": 1e-5}


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_fold_equals_full_forward(family, family_folder, family_checkpoint):
    ids = tiny.token_ids()
    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    layers = StreamedLayers(family_checkpoint(family), CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(ids))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING.get(family, 0.0))
    _, resident = forward_layers(ResidentLayers(model), windows_of(ids))
    assert torch.equal(resident, hidden)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_fold_with_padding_equals_full_forward(family, family_folder, family_checkpoint):
    ids = tiny.token_ids()
    mask = torch.arange(ids.shape[1])[None] < torch.tensor([12, 7, 3])[:, None]
    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long(), use_cache=False).logits
    layers = StreamedLayers(family_checkpoint(family), CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(ids, mask))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected)
    assert torch.equal(logits[mask], expected[mask])


@pytest.mark.parametrize("family", slow_families(tiny.CONFIGS))
def test_batches_of_one_size_are_each_called_as_the_model_calls_them(
    family, family_folder, family_checkpoint, monkeypatch
):
    ids = tiny.token_ids(4, 12)
    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(2)])
    monkeypatch.setattr("moe_compress.engine.forward.TOKENS_PER_BATCH", 24)
    layers = StreamedLayers(family_checkpoint(family), CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(ids))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected)
    # DeepSeek-V4's sums depend on where in memory a batch begins.
    torch.testing.assert_close(logits, expected, rtol=0, atol={**ROUNDING, "deepseek_v4": 1e-6}.get(family, 0.0))


def test_what_a_config_asks_for_beside_the_logits_is_not_given(family_folder, tmp_path):
    """Fine-tunes are published with output_router_logits=true, which needs what all layers return."""
    plain = AutoModelForCausalLM.from_pretrained(family_folder("mixtral")).eval()
    folder = Path(shutil.copytree(family_folder("mixtral"), tmp_path / "asking"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "output_router_logits": True, "return_dict": False}))
    ids = tiny.token_ids()
    layers = StreamedLayers(open_checkpoint(folder), CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(ids))
    with torch.no_grad():
        assert torch.equal(hf.head(layers.model, hidden), plain(ids, use_cache=False).logits)
