"""Tiny random multimodal models: a Mixture-of-Experts language model among other towers, as its type is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from support import tiny

_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": tiny.INNER,
    "num_experts_per_tok": tiny.TOP_K,
}
_VISION: dict[str, Any] = {
    **{"depth": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
    **{"num_attention_heads": 2, "out_hidden_size": tiny.HIDDEN, "patch_size": 4, "num_position_embeddings": 16},
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_QWEN_ROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_KINDS = ["linear_attention", "full_attention", "linear_attention"]
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# By model_type: values of the language model, of the vision tower, and of the wrapper itself.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_5_moe": (
        {"num_experts": 8, "shared_expert_intermediate_size": 40, "layer_types": _KINDS, **_LINEAR},
        {"deepstack_visual_indexes": [0]},
        {"tie_word_embeddings": False},
    ),
    "qwen3_vl_moe": ({"num_experts": 8, **_QWEN_ROPE}, {"deepstack_visual_indexes": [0]}, {}),
    "glm4v_moe": (
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}},
        {"image_size": 16},
        {},
    ),
    "llama4": (
        {"num_local_experts": 8, "intermediate_size": tiny.INNER, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 1},
        {"image_size": 16, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
        | {"intermediate_size": 64},
        {},
    ),
    "gemma4": (
        {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "layer_types": _SLIDING, "sliding_window": 16}
        | {"global_head_dim": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "num_kv_shared_layers": 0}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": tiny.VOCAB},
        {"global_head_dim": 8, "head_dim": 8, "num_key_value_heads": 2},
        {"audio_config": None, "tie_word_embeddings": True},
    ),
    "kimi_k25": (
        {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **_MLA},
        {},
        {"projection_hidden_size": 16},
    ),
    "minimax_m3_vl": (
        {"num_local_experts": 8},
        {"image_size": 16},
        {},
    ),
    "step3p7": (
        {"n_routed_experts": 8, "share_expert_dim": 40, "mlp_layer_types": ["dense", "sparse", "sparse"]}
        | {"layer_types": _SLIDING, "sliding_window": 16},
        {"image_size": 16},
        {},
    ),
}
# Qwen3-Omni holds two language models: of the one that thinks, all of the above is inside `thinker_config`.
_TALKER = {**_TEXT, **_QWEN_ROPE, "num_experts": 4, "shared_expert_intermediate_size": 16}
_PREDICTOR = {"vocab_size": 16, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 1, "head_dim": 8}
_PREDICTOR |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
_WAVES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
_WAVES |= {"intermediate_size": 16, "decoder_dim": 32, "codebook_size": 16, "upsample_rates": [2]}
_EARS = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "n_window": 4}
_EARS |= {"output_dim": tiny.HIDDEN, "downsample_hidden_size": 8}
WRAPPERS["qwen3_omni_moe"] = (
    {"num_experts": 8, **_QWEN_ROPE},
    {"deepstack_visual_indexes": [0]},
    {
        "talker_config": {"text_config": _TALKER, "code_predictor_config": _PREDICTOR, "num_code_groups": 4}
        | {"thinker_hidden_size": tiny.HIDDEN, "spatial_merge_size": 2},
        "code2wav_config": {**_WAVES, "upsampling_ratios": [2]},
    },
)
TOWERS = ("vis", "vit", "audio", "projector", "embed_vision")


def config_of(model_type: str, **overrides: Any) -> Any:
    """A small config; `overrides` are the language model's."""
    text, vision, own = WRAPPERS[model_type]
    parts = {"text_config": {**_TEXT, **text, **overrides}, "vision_config": {**_VISION, **vision}}
    if model_type == "qwen3_omni_moe":
        parts = {"thinker_config": {**parts, "audio_config": _EARS, "vision_start_token_id": 151_652}}
    return AutoConfig.for_model(model_type, **parts, **own)


def make(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose routers are not degenerate."""
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(config_of(model_type, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.copy_(noise * 0.1)
    return model.eval()


def save(model_type: str, folder: Path, **overrides: Any) -> Path:
    """Write one as it is published."""
    make(model_type, **overrides).save_pretrained(folder)
    if model_type == "kimi_k25":  # transformers calls the decoder layers blocks, as those of the tower, where it saves
        rename(folder, lambda name: name.replace("language_model.model.blocks.", "language_model.model.layers."))
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint other names."""
    _replace(folder, {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()})


def only(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Leave nothing but these tensors in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    _replace(folder, {name: tensor for name, tensor in tensors.items() if wanted(name)})


def fuse_experts(folder: Path) -> None:
    """Store the experts of every layer in two tensors, as some are published that transformers saves one by one."""
    tensors = load_file(folder / "model.safetensors")
    experts = sorted((name for name in tensors if ".experts." in name), key=lambda name: int(name.split(".")[-3]))
    for stem in {name.rpartition(".experts.")[0] + ".experts" for name in experts}:
        parts = {
            part: torch.stack([tensors.pop(n) for n in experts if n.startswith(stem) and f".{part}_proj" in n])
            for part in ("gate", "up", "down")
        }
        tensors[f"{stem}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        tensors[f"{stem}.down_proj"] = parts["down"]
    _replace(folder, tensors)


def _replace(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
