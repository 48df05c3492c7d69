"""Whether a head is the embedding is decided as stock transformers decides it: by what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from support import readers, tiny
from support.editing import logits_of
from support.tiny import CPU, windows_of


@pytest.fixture(params=["another head", "the same head", "no head", "no embedding"])
def model(request, tmp_path) -> Path:
    """A config that ties, and files that agree or do not."""
    folder = readers.save_model("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors.pop("lm_head.weight", None)
    if request.param == "another head":
        tensors["lm_head.weight"] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    elif request.param != "no head":
        tensors["lm_head.weight"] = embedding.clone()
    if request.param == "no embedding":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_layers_that_are_read_one_by_one_have_the_stock_model_s_head(model):
    stock = load_model(model, torch.float32)
    layers = StreamedLayers(open_checkpoint(model), CPU, torch.float32)
    ids_NS = tiny.token_ids() % readers.VOCAB
    _, hidden_NSD = forward_layers(layers, windows_of(ids_NS))
    found = hf.head(layers.model, hidden_NSD.flatten(0, 1)).view(*ids_NS.shape, -1)
    with torch.no_grad():
        expected = stock(ids_NS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_cut_model_keeps_its_head(model, options):
    made = moe_compress.compress(
        "expert_drop score=weight_norm keep=6", model=model, **{**options, "eval": False}
    ).folder
    assert made is not None
    before, after = load_model(model, torch.float32), load_model(made, torch.float32)
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    tied = json.loads((made / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (before.lm_head.weight is before.model.embed_tokens.weight)
    assert logits_of(after).isfinite().all()
