"""The engine is exact: layer by layer is the full forward, on every family.

The last bits of a product depend on where in memory its factors lie, on some processors: 1e-6 on logits near 1 allows
for that and for nothing else.
"""

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

# DBRX's own loop over flat experts multiplies in another order than stacks of them do.
ANOTHER_ORDER = {"dbrx": 1e-5}
LAST_BITS = 1e-6


def require_close(found: torch.Tensor, expected: torch.Tensor, family: str) -> None:
    """Equal up to the last bits."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=ANOTHER_ORDER.get(family, LAST_BITS))


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_fold_equals_full_forward(family, family_folder, family_checkpoint):
    ids = tiny.token_ids()
    model = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    layers = StreamedLayers(family_checkpoint(family), CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(ids))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected)
    require_close(logits, expected, family)
    _, resident = forward_layers(ResidentLayers(model), windows_of(ids))
    require_close(resident, hidden, family)


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
    require_close(logits[mask], expected[mask], family)


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
    require_close(logits, expected, family)


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
        expected = plain(ids, use_cache=False).logits
        require_close(hf.head(layers.model, hidden), expected, "mixtral")
