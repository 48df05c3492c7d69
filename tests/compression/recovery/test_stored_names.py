"""What is learned is written under the names that the checkpoint has, wherever a parameter lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from support import readers, wrappers
from support.pruned import same_bits, stored
from support.slow import slow_after

WORDS = "expert_drop score=weight_norm keep=4 + distill steps=2 train=all"


def learned(model: Path, options, words: str = WORDS) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of what has learned, and which of them are not those of the model it was made of."""
    folder = moe_compress.compress(words, **{**options, "model": str(model), "eval": False}).folder
    before, after = stored(model), stored(folder)
    assert moe_compress.load(str(folder), torch.float32) is not None
    return after, {name for name, each in after.items() if name not in before or not same_bits(each, before[name])}


@pytest.mark.slow
def test_a_head_that_is_tied_is_stored_once(options, tmp_path):
    model = readers.save_model("mixtral", tmp_path / "model", tie_word_embeddings=True)
    after, changed = learned(model, options)
    assert "model.embed_tokens.weight" in changed and "lm_head.weight" not in after


def test_a_head_that_is_tied_and_stored_all_the_same_stays_the_embeddings_equal(options, tmp_path):
    """One that differed would be loaded as a head of its own."""
    model = readers.save_model("mixtral", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    after, changed = learned(model, options)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
    assert same_bits(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.slow
def test_names_without_a_prefix_stay_so(options, tmp_path):
    """Those of DeepSeek-V4, which transformers would save with one."""
    model = readers.save_model("deepseek_v4", tmp_path / "model")
    after, changed = learned(model, options, f"{WORDS} loss=logits,hidden,router")
    assert (
        after.keys() <= {name for name in stored(model)}
        and {"embed_tokens.weight", "layers.0.attn.attn_sink"} <= changed
    )


@pytest.mark.parametrize(
    "family", slow_after(1, ["kimi_k25", "qwen3_vl_moe", "llama4", "minimax_m3_vl", "step3p7", "gemma4"])
)
def test_other_towers_are_left_alone(family, options, tmp_path):
    """All of a wrapper's language model learns, under the names that it is published with."""
    over = {"vocab_size_per_layer_input": readers.VOCAB} if family == "gemma4" else {}
    model = wrappers.save(family, tmp_path / "model", vocab_size=readers.VOCAB, **over)
    readers.tokenizer().save_pretrained(model)
    after, changed = learned(model, options)
    towers = {name for name in after if any(word in name for word in (*wrappers.TOWERS, "patch_merge"))}
    assert changed and not changed & towers and after.keys() <= stored(model).keys()
    assert {name for name in after if name not in changed | towers} <= {n for n in after if n.endswith("layer_scalar")}
