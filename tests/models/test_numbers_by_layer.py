"""Configs that list, layer by layer, what others say once (Hunyuan-A13B's experts per token)."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def test_groups_under_another_name(tmp_path):
    """Bailing keeps `n_group` as an alias of a key of its own; it routes within groups all the same."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": tiny.INNER, "head_dim": 8}
    sizes |= {"num_local_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bailing_hybrid", **sizes, layer_group_size=2, first_k_dense_replace=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source = open_checkpoint(tiny.save(model, tmp_path / "bailing"))
    assert [(moe.groups, moe.groups_used) for moe in model_shape(original(source)).moe] == [(2, 1)] * 2
    edits = [KeepExperts(layer, SIX) for layer in (1, 2)]
    out = write(source, edits, tmp_path / "out")
    assert out.config.model_type == "bailing_hybrid"
    assert torch.equal(logits_of(original(out)), logits_of(cut(source, edits)))
    with pytest.raises(ValueError, match="must keep equally many experts"):
        write(source, [KeepExperts(1, (0, 1, 2, 4))], tmp_path / "uneven")
