"""Buffers that a model makes itself, and that old checkpoints store: passed over, as stock transformers does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import KeepExperts
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from support import tiny
from support.editing import IDS, SIX, logits_of, moe_layers, original, write
from support.tiny import windows_of


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def with_buffers(request, family_folder, tmp_path):
    """A checkpoint that stores the frequencies of every layer's rotary embedding."""
    tensors = load_file(family_folder(request.param) / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(tiny.LAYERS)}
    folder = tmp_path / request.param
    folder.mkdir()
    (folder / "config.json").write_bytes((family_folder(request.param) / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def streamed(source) -> torch.Tensor:
    layers = StreamedLayers(source, tiny.CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(IDS))
    return hf.head(layers.model, hidden.flatten(0, 1)).view(*IDS.shape, -1)


def test_they_change_nothing(with_buffers):
    assert torch.equal(streamed(with_buffers), logits_of(original(with_buffers)))


def test_a_checkpoint_that_stores_them_is_cut(with_buffers, family_checkpoint, tmp_path):
    edits = [KeepExperts(layer, SIX) for layer in moe_layers(with_buffers)]
    plain = write(family_checkpoint(with_buffers.config.model_type), edits, tmp_path / "plain")
    out = write(with_buffers, edits, tmp_path / "out")
    assert torch.equal(streamed(out), logits_of(original(plain)))


def test_other_tensors_that_fit_nothing_are_refused(with_buffers):
    file = with_buffers.folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.odd.weight": torch.rand(4)}, file)
    with pytest.raises(ValueError, match=r"odd\.weight fits nothing"):
        streamed(open_checkpoint(with_buffers.folder))
