"""Keys of a published config that transformers passes over are read under the names that it knows (DBRX)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from support import readers, tiny

FAR, NEAR = 500_000, 10_000


def published(folder: Path, **more: object) -> Path:
    """A tiny DBRX as its makers publish it: what turns keys and queries stands among what attention needs."""
    readers.save_model("dbrx", folder)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    values["attn_config"]["rope_theta"] = FAR
    (folder / "config.json").write_text(json.dumps({**values, **more}))
    return folder


@torch.no_grad()
def stock(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Tensor = model.eval()(tiny.token_ids(), use_cache=False).logits
    return found


@torch.no_grad()
def streamed(folder: Path) -> Tensor:
    layers, windows = (
        StreamedLayers(open_checkpoint(folder), tiny.CPU, torch.float32),
        tiny.windows_of(tiny.token_ids()),
    )
    _, hidden_NSD = forward_layers(layers, windows)
    return hf.head(layers.model, hidden_NSD.flatten(0, 1)).unflatten(0, hidden_NSD.shape[:2])


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-5)


@torch.no_grad()
def test_what_transformers_passes_over_is_read_and_written_where_it_reads_it(tmp_path, caplog):
    folder = published(tmp_path / "published")
    source = open_checkpoint(folder)
    assert "attn_config.rope_theta, which transformers passes over: it is read as rope_theta" in caplog.text
    assert source.config.rope_parameters["rope_theta"] == FAR
    ours = streamed(folder)
    assert close(moe_compress.load(folder)(tiny.token_ids(), use_cache=False).logits, ours)
    assert not close(stock(folder), ours)  # it turns by 10,000
    said = published(tmp_path / "said", rope_theta=FAR)
    assert close(stock(said), ours)
    words = {"eval": False, "results": tmp_path / "runs"}
    made = moe_compress.compress("expert_drop keep=6 score=weight_norm", model=folder, **words).folder
    assert json.loads((made / "config.json").read_text())["rope_theta"] == FAR
    assert close(stock(made), streamed(made))


@pytest.mark.parametrize(
    "more", [{"rope_theta": NEAR}, {"rope_parameters": {"rope_type": "default", "rope_theta": NEAR}}]
)
def test_what_it_reads_goes_before(more, tmp_path, caplog):
    source = open_checkpoint(published(tmp_path, **more))
    assert source.config.rope_parameters["rope_theta"] == NEAR and "passes over" not in caplog.text
