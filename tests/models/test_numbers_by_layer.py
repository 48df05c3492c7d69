"""Configs that list, layer by layer, what others say once (Hunyuan-A13B's experts per token)."""

from __future__ import annotations

import json

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import DropLayer, KeepExperts
from moe_compress.models.shape import model_shape
from support import tiny
from support.editing import SIX, cut, logits_of, original, write


@pytest.fixture
def listed(tmp_path):
    """(experts per token of each layer) -> a tiny Hunyuan whose config lists them."""

    def made(top_k: list[int]):
        folder = tiny.save(tiny.make("hunyuan_v1_moe", moe_topk=top_k), tmp_path / "listed")
        lists = {"num_shared_expert": [1] * tiny.LAYERS, "moe_intermediate_size": [tiny.INNER] * tiny.LAYERS}
        values = json.loads((folder / "config.json").read_text()) | lists
        (folder / "config.json").write_text(json.dumps(values))
        return open_checkpoint(folder)

    return made


def test_a_list_of_one_number_is_that_number(listed, family_checkpoint):
    source, plain = listed([tiny.TOP_K] * tiny.LAYERS), family_checkpoint("hunyuan_v1_moe")
    assert torch.equal(logits_of(original(source)), logits_of(original(plain)))
    before, after = (moe_compress.plan("expert_drop keep=6", model=each.folder) for each in (source, plain))
    assert (before.before, before.after, before.form) == (after.before, after.after, "plain")


@pytest.mark.parametrize("top_k", [[2, 2, 2], [2, 1, 3]])
@pytest.mark.parametrize("edits", [[KeepExperts(layer, SIX) for layer in range(tiny.LAYERS)], [DropLayer(0)]])
def test_what_is_cut_loads_as_what_was_edited(top_k, edits, listed, tmp_path):
    source = listed(top_k)
    out = write(source, edits, tmp_path / "out")
    assert torch.equal(logits_of(moe_compress.load(out.folder)), logits_of(cut(source, edits)))


def test_layers_with_experts_per_token_of_their_own(listed):
    shape = model_shape(original(listed([2, 1, 3])))
    assert [moe.top_k for moe in shape.moe] == [2, 1, 3]
