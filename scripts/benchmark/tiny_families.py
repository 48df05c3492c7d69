"""A tiny random model of every family, for checks that run on all of them; the tests use them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import with_settings

VOCAB, HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 96, 32, 24, 8, 2, 3

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_FUSED_INNER = {"head_dim": 8, "intermediate_size": INNER}
_MOE_INNER = {"intermediate_size": 48, "moe_intermediate_size": INNER}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_PLAIN = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_INDEXER = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 6, "n_group": 1, "topk_group": 1}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_FUSED_INNER, **_LOCAL},
    "deepseek_v2": {**_MLA, **_MOE_INNER, **_ROUTED, "q_lora_rank": None, "n_shared_experts": 2}
    | {"first_k_dense_replace": 1},
    "deepseek_v3": {**_MLA, **_MOE_INNER, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 2, "topk_group": 1},
    "qwen2_moe": {**_MOE_INNER, **_PLAIN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_MOE_INNER, **_PLAIN, "head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": {**_MOE_INNER, **_PLAIN, **_LINEAR_ATTENTION, "head_dim": 8, "shared_expert_intermediate_size": 40},
    "olmoe": {**_PLAIN, "intermediate_size": INNER},
    "flex_olmo": {**_PLAIN, "intermediate_size": INNER},
    "gpt_oss": {**_FUSED_INNER, **_LOCAL, "sliding_window": 16},
    "llama4_text": {**_FUSED_INNER, **_LOCAL, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
    | {"interleave_moe_layer_step": 1},
    "glm4_moe": {**_MOE_INNER, **_ROUTED, "head_dim": 8, "first_k_dense_replace": 1},
    "phimoe": {**_LOCAL, "intermediate_size": INNER},
    "granitemoe": {**_LOCAL, "intermediate_size": INNER},
    "granitemoeshared": {**_LOCAL, "intermediate_size": INNER, "shared_intermediate_size": 40},
    "jamba": {**_PLAIN, "intermediate_size": INNER, "use_mamba_kernels": False, "attn_layer_period": 2}
    | {"attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4}
    | {"mamba_dt_rank": 4},
    "ernie4_5_moe": {**_MOE_INNER, "moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 2}
    | {"moe_layer_start_index": 1},
    "minimax": {**_FUSED_INNER, **_LOCAL, "block_size": 8},
    "minimax_m2": {**_FUSED_INNER, **_LOCAL},
    "hunyuan_v1_moe": {**_FUSED_INNER, "num_experts": EXPERTS, "moe_topk": TOP_K},
    "dots1": {**_MOE_INNER, **_ROUTED, "head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1},
    "nemotron_h": {**_MOE_INNER, **_ROUTED, "head_dim": 8, "moe_shared_expert_intermediate_size": 40}
    | {"layers_block_type": ["moe", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 8}
    | {"ssm_state_size": 8, "n_groups": 2},
    "longcat_flash": {**_MLA, "head_dim": 8, "ffn_hidden_size": 48, "expert_ffn_hidden_size": INNER}
    | {"n_routed_experts": EXPERTS, "zero_expert_num": 2, "moe_topk": TOP_K, "num_layers": LAYERS},
    "afmoe": {**_MOE_INNER, **_PLAIN, "head_dim": 8, "num_shared_experts": 1, "num_dense_layers": 1}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16},
    "lfm2_moe": {**_MOE_INNER, **_PLAIN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "jetmoe": {**_LOCAL, "kv_channels": 8, "intermediate_size": INNER},
    "exaone_moe": {**_MOE_INNER, **_PLAIN, "head_dim": 8, "num_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1},
    "mimo_v2_flash": {**_MOE_INNER, **_ROUTED, "head_dim": 8, "v_head_dim": 8, "sliding_window": 16}
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "glm_moe_dsa": {**_MLA, **_MOE_INNER, **_ROUTED, **_INDEXER, "n_shared_experts": 1, "head_dim": 8}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full"] * LAYERS},
    "hy_v4": {**_MLA, **_MOE_INNER, **_ROUTED, **_INDEXER, "n_shared_experts": 1, "head_dim": 8, "hc_mult": 2}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full"] * LAYERS},
    "inkling_text": {**_MOE_INNER, **_ROUTED, "n_shared_experts": 2, "head_dim": 8, "swa_head_dim": 8}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4, "rel_extent": 16}
    | {"sliding_window_size": 8, "local_layer_ids": [0, 2], "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v4": {**_ROUTED, "moe_intermediate_size": INNER, "n_shared_experts": 1, "num_key_value_heads": 1}
    | {"head_dim": 16, "partial_rotary_factor": 0.5, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2}
    | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "sliding_window": 8}
    | {"layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]}
    | {"mlp_layer_types": ["hash_moe", "moe", "moe"]}
    | {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dbrx": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
    | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10_000.0}}
    | {"ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K}},
    "zaya": {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 1, "head_dim": 8}
    | {"router_hidden_size": 16},
}
NO_EXPERT_EDITS = ("jetmoe", "longcat_flash", "zaya")
# Published under names without the prefix of the base model, which transformers writes but does not read back.
_BARE = ("deepseek_v4",)
EDITABLE = tuple(name for name in CONFIGS if name not in NO_EXPERT_EDITS)


def make(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose routers are not degenerate, its experts in the form in which they are worked on."""
    values = with_settings({**_BASE, **CONFIGS[family]}, overrides)
    if family == "longcat_flash":
        values.pop("num_hidden_layers")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.copy_(noise * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
            if name.endswith("tid2eid"):  # which experts each token uses
                noise = torch.rand(len(buffer), EXPERTS, generator=generator)
                buffer.copy_(noise.topk(buffer.shape[1]).indices)
    hf.complete_experts(model)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model as an ordinary checkpoint."""
    module: nn.Module = model  # whose `to` takes a dtype; that of the class above is declared without
    module.to(dtype)
    model.save_pretrained(folder)
    module.to(torch.float32)
    if model.config.model_type in _BARE:
        file, prefix = folder / "model.safetensors", f"{model.base_model_prefix}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def token_ids(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
