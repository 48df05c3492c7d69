"""DeepSeek-MoE v1, which transformers cannot build, is read as Qwen2-MoE: the same function, checked independently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import KeepExperts, MakeDense
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from support import tiny
from support.editing import write
from support.identity import rewritten
from support.tiny import windows_of

IDS = tiny.token_ids()
LAYERS, HEADS, EXPERTS, TOP_K, INNER = 3, 4, 8, 2, 24


def tensors() -> dict[str, Tensor]:
    """Random weights under the names of the DeepSeek-MoE-16B checkpoint; the first layer is dense."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    width = tiny.HIDDEN
    out = {"model.embed_tokens.weight": random(tiny.VOCAB, width) * 6, "lm_head.weight": random(tiny.VOCAB, width)}
    out["model.norm.weight"] = 1 + 0.1 * random(width)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            out[f"{at}self_attn.{name}_proj.weight"] = random(width, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{name}.weight"] = 1 + 0.1 * random(width)
        mlps = {"mlp.": 56}
        if layer:
            mlps = {f"mlp.experts.{e}.": INNER for e in range(EXPERTS)} | {"mlp.shared_experts.": 2 * INNER}
            out[f"{at}mlp.gate.weight"] = random(EXPERTS, width)
        for name, inner in mlps.items():
            out[f"{at}{name}gate_proj.weight"] = random(inner, width)
            out[f"{at}{name}up_proj.weight"] = random(inner, width)
            out[f"{at}{name}down_proj.weight"] = random(width, inner)
    return out


@dataclass(frozen=True)
class Reference:
    """DeepSeek-MoE v1 written down once more: softmax over the experts in `kept`, top-k, routed plus shared."""

    tensors: dict[str, Tensor]
    renormalise: bool = False
    kept: Sequence[int] = tuple(range(EXPERTS))

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(LAYERS):
            at = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, f"{at}input_layernorm.weight"), f"{at}self_attn.")
            h = self.norm(x, f"{at}post_attention_layernorm.weight")
            x = x + (self.moe(h.flatten(0, 1), f"{at}mlp.").view_as(h) if layer else self.mlp(h, f"{at}mlp."))
        return self.linear(self.norm(x, "model.norm.weight"), "lm_head")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.tensors[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def mlp(self, x: Tensor, at: str) -> Tensor:
        gate, up = self.linear(x, f"{at}gate_proj"), self.linear(x, f"{at}up_proj")
        return self.linear(gate * torch.sigmoid(gate) * up, f"{at}down_proj")

    def attention(self, x: Tensor, at: str) -> Tensor:
        rows, length, size = *x.shape[:2], tiny.HIDDEN // HEADS
        angle = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)

        def rotated(t: Tensor) -> Tensor:
            half = torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1)
            return t * angle.cos()[:, None] + half * angle.sin()[:, None]

        q, k, v = (self.linear(x, f"{at}{name}_proj").view(rows, length, HEADS, size) for name in "qkv")
        score = torch.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) * size**-0.5
        score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)
        return self.linear(mixed.reshape(rows, length, -1), f"{at}o_proj")

    def moe(self, x: Tensor, at: str) -> Tensor:
        weights, chosen = self.linear(x, f"{at}gate")[:, list(self.kept)].softmax(-1).topk(TOP_K)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self.mlp(x, f"{at}shared_experts.")
        for t in range(len(x)):
            for w, e in zip(weights[t], chosen[t], strict=True):
                out[t] += w * self.mlp(x[t], f"{at}experts.{self.kept[int(e)]}.")
        return out


def save(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    values = {
        "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "vocab_size": tiny.VOCAB,
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}, "hidden_size": tiny.HIDDEN,
        "intermediate_size": 56, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "n_shared_experts": 2,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_layer_freq": 1, "norm_topk_prob": False,
        "first_k_dense_replace": 1, "scoring_func": "softmax", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": 64, "pad_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch."),
    } | changes  # fmt: skip
    folder.mkdir()
    save_file({name: tensor.to(dtype) for name, tensor in tensors().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("renormalise", [False, True])
def test_deepseek_v1_is_read_exactly(renormalise, tmp_path):
    source = open_checkpoint(save(tmp_path / "v1", torch.float32, norm_topk_prob=renormalise))
    expected = Reference(tensors(), renormalise)(IDS)
    layers = StreamedLayers(source, torch.device("cpu"), torch.float32)
    _, hidden = forward_layers(layers, windows_of(IDS))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [tuple(range(EXPERTS)), (0, 2, 3, 7)], ids=["whole", "cut"])
def test_deepseek_v1_is_written_as_plain_qwen2_moe(kept, tmp_path):
    source = open_checkpoint(save(tmp_path / "v1", torch.float32))
    edits = [KeepExperts(layer, kept) for layer in (1, 2)] if len(kept) < EXPERTS else []
    written = write(source, edits, tmp_path / "out")
    assert written.values["model_type"] == "qwen2_moe" and "auto_map" not in written.values
    model, info = AutoModelForCausalLM.from_pretrained(written.folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, Reference(tensors(), kept=kept)(IDS), rtol=0, atol=1e-5)


def test_deepseek_v1_with_fixed_gates_is_a_dense_llama(tmp_path):
    source = open_checkpoint(save(tmp_path / "v1", torch.float32))
    gates, width = tuple(0.1 * (e + 1) for e in range(EXPERTS)), (EXPERTS + 2) * INNER
    # The gate of the shared experts is a half, and their down projection twice what it was.
    edits = [MakeDense(0, (), (), width)] + [MakeDense(n, tuple(range(EXPERTS)), gates, width, 0.5) for n in (1, 2)]
    model, info = AutoModelForCausalLM.from_pretrained(
        write(source, edits, tmp_path / "out").folder, output_loading_info=True
    )
    assert not any(info.values()) and model.config.model_type == "llama", info

    class Fixed(Reference):
        def moe(self, x: Tensor, at: str) -> Tensor:
            routed = [gate * self.mlp(x, f"{at}experts.{e}.") for e, gate in enumerate(gates)]
            return self.mlp(x, f"{at}shared_experts.") + sum(routed)

    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, Fixed(tensors())(IDS), rtol=0, atol=1e-5)


def test_deepseek_v1_in_bf16_is_the_same_by_copy_and_through_the_model(tmp_path):
    source = open_checkpoint(save(tmp_path / "v1", torch.bfloat16))
    shards = []
    for written in (write(source, [], tmp_path / "copied"), rewritten(source, tmp_path / "through the model")):
        with written.read(written.tensors) as tensors:
            shards.append({name: tensor[:] for name, tensor in tensors.items()})
    assert shards[0].keys() == shards[1].keys()
    for name, tensor in shards[0].items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, shards[1][name]), name


@pytest.mark.parametrize("key", ["scoring_func", "moe_layer_freq", "attention_bias", "rope_scaling"])
def test_deepseek_v1_variants_that_cannot_be_expressed_are_refused(key, tmp_path):
    odd = {"scoring_func": "sigmoid", "moe_layer_freq": 2, "attention_bias": True, "rope_scaling": {"type": "linear"}}
    folder = save(tmp_path / "v1", torch.float32, **{key: odd[key]})
    with pytest.raises(ValueError, match=key):
        open_checkpoint(folder)
