"""DeepSeek-MoE-16B (`model_type: deepseek`) as Qwen2-MoE, exactly.

transformers has no class for it. Qwen2-MoE computes the same function when the shared expert's gate is zero
(sigmoid(0) = 1/2) and its down projection is doubled, which is exact in floating point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from moe_compress.models.families import ORIGIN_KEY

COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_theta", "attention_dropout", "num_experts_per_tok",
    "norm_topk_prob", "pad_token_id", "bos_token_id", "eos_token_id", "torch_dtype", "dtype",
)  # fmt: skip


def recognises(values: Mapping[str, Any]) -> bool:
    """Whether config.json values are those of DeepSeek-MoE v1."""
    return values.get("model_type") == "deepseek"


def config_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same model's config.json as Qwen2-MoE; ValueError for variants that it cannot express."""
    unsupported = {"scoring_func": "softmax", "rope_scaling": None, "attention_bias": False, "moe_layer_freq": 1}
    for key, needed in unsupported.items():
        if values.get(key, needed) != needed:
            raise ValueError(f"this DeepSeek-MoE v1 config has {key}={values[key]}; only {needed} can be expressed.")
    return {
        **{key: values[key] for key in COPIED if key in values},
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_key_value_heads": values.get("num_key_value_heads", values["num_attention_heads"]),
        "num_experts": values["n_routed_experts"],
        "shared_expert_intermediate_size": values["n_shared_experts"] * values["moe_intermediate_size"],
        "mlp_only_layers": list(range(values.get("first_k_dense_replace", 0))),
        "decoder_sparse_step": 1,
        "norm_topk_prob": values.get("norm_topk_prob", False),
        "qkv_bias": False,
        "use_sliding_window": False,
        ORIGIN_KEY: "deepseek",
    }


def rename(key: str) -> tuple[str, Callable[[Tensor | None], Tensor] | None]:
    """Qwen2-MoE's name for a tensor, and how its value is computed (None: as stored)."""
    new_key = key.replace("mlp.shared_experts.", "mlp.shared_expert.")
    return new_key, _doubled if new_key.endswith("mlp.shared_expert.down_proj.weight") else None


def _doubled(stored: Tensor | None) -> Tensor:
    assert stored is not None
    return stored * 2


def constant_keys(keys: Iterable[str]) -> list[str]:
    """Names of the shared experts' gates, which are zero."""
    shared = re.compile(r"(.*\.mlp)\.shared_expert\.down_proj\.weight")
    return [f"{found.group(1)}.shared_expert_gate.weight" for key in keys if (found := shared.fullmatch(key))]
