"""What differs between families, as data. Most need no entry: they are recognised by structure and config keys.

A new family that keeps its experts, router and shared experts where others keep them works at once; one that
does not gets one `Family` entry below. Nothing here asks for a model's class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedConfig

COUNT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, by its `model_type`.

    count_key, top_k_key: config keys of the routed experts per layer and of those active per token;
    router: child of the MoE block that routes (None: the one whose class name says so);
    router_scores: the function the router applies to its logits before it selects;
    paper_gate: which gate mass the Unified-MoE-Compression code sums for this family;
    min_per_group: fewest experts a group may keep, where routing is limited to groups (most add up the best two);
    logits_at: which of the router's outputs of width E are its logits;
    normed_output: a norm stands between the experts and the stream, so their share of it is not known;
    block_outputs: how many values the MoE block returns;
    fixed_top_k: the router is written for its number of experts per token;
    no_expert_edits: why experts cannot be changed here, if they cannot.
    """

    model_type: str
    count_key: str = ""
    top_k_key: str = ""
    router: str | None = None
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    paper_gate: Literal["full", "topk"] = "full"
    min_per_group: int = 2
    logits_at: int = 0
    normed_output: bool = False
    block_outputs: int = 1
    fixed_top_k: bool = False
    no_expert_edits: str | None = None


def _sigmoid(model_type: str, **more: Any) -> Family:
    return Family(model_type=model_type, router_scores="sigmoid", **more)


SIGMOID_ROUTERS = (
    "axk1", "axk2", "bailing_hybrid", "deepseek_v32", "dots1", "dots3_note_text", "exaone_moe",
    "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "hy_v4", "kimi_linear", "laguna",
    "lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "solar_open",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *map(_sigmoid, SIGMOID_ROUTERS),
        Family(model_type="deepseek", paper_gate="topk"),
        Family(model_type="deepseek_v2", paper_gate="topk", min_per_group=1),
        _sigmoid("deepseek_v3", paper_gate="topk"),
        _sigmoid("llama4_text", logits_at=1, block_outputs=2),
        Family(model_type="gpt_oss", block_outputs=2),
        Family(model_type="phimoe", fixed_top_k=True),
        Family(model_type="flex_olmo", normed_output=True),
        *(_sigmoid(name, normed_output=True) for name in ("afmoe", "beam", "kolibri1")),
        Family(
            model_type="deepseek_v4",
            no_expert_edits="its first layers look experts up in a table of token ids, which no edit here rewrites yet",
        ),
        Family(
            model_type="jetmoe",
            no_expert_edits="its attention is routed by the same expert count as its MLP, so neither can be cut alone",
        ),
        Family(
            model_type="longcat_flash",
            no_expert_edits="its zero-computation experts share the router's numbering with the routed ones",
        ),
    )
}

# Architectures that transformers 5.23 cannot build, but another one expresses exactly (see checkpoints/reader.py).
ALIASES = {"deepseek": "qwen2_moe"}
ORIGIN_KEY = "reexpressed_from"

REFUSED = {
    "dbrx": "its experts are one flat matrix per projection, which no edit here can cut yet",
    "llama4": "it is a multimodal wrapper: extract its language model (model_type llama4_text) first",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family entry of a config, completed from the config's own keys.

    Raises ValueError for an architecture that has no experts or is known not to work, with the reason.
    """
    base_type = getattr(config, "moe_compress", {}).get("base_model_type", config.model_type)
    if base_type in REFUSED:
        raise ValueError(f"{base_type} is not supported: {REFUSED[base_type]}.")
    family = FAMILIES.get(base_type, Family(model_type=base_type))
    stored = config.to_dict()
    count_key = family.count_key or next((k for k in COUNT_KEYS if stored.get(k)), "")
    top_k_key = family.top_k_key or next((k for k in TOP_K_KEYS if stored.get(k)), "")
    if not count_key or not top_k_key:
        raise ValueError(
            f"{base_type} is not a Mixture-of-Experts architecture that is known here: its config has none of "
            f"{', '.join(COUNT_KEYS)} or none of {', '.join(TOP_K_KEYS)}."
        )
    origin = FAMILIES.get(getattr(config, ORIGIN_KEY, ""), family)
    return replace(family, count_key=count_key, top_k_key=top_k_key, paper_gate=origin.paper_gate)


def groups_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(number of router groups, groups a token may use); (1, 1) where routing is not limited to groups."""
    if getattr(config, "topk_method", None) == "greedy":
        return 1, 1
    groups = getattr(config, "n_group", None) or 1
    return (groups, getattr(config, "topk_group", None) or groups) if groups > 1 else (1, 1)
