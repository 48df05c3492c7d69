"""What differs between families, as data. Most need no entry: they are recognised by structure and config keys.

A new family that keeps its experts, router and shared experts where others keep them works at once; one that
does not gets one entry in `FAMILIES` below, and nothing else (docs/extending/family.md). No model's class is asked
for, and neither torch nor transformers is imported, so that listing families is instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COUNT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
# Norms around the MoE block, in the order in which they tell: the last is the block's own only in pre-norm layers.
MOE_NORMS = (
    ("pre_mlp_layernorm", "post_mlp_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_feedforward_layernorm",),
    ("pre_ff_layernorm",),
    ("ffn_norm",),
    ("post_attention_layernorm",),
)
ATTENTION = ("self_attn", "self_attention", "attention", "attn")


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """The state of a recurrent mixer: the mixer's attributes whose product is its size, and FLOPs an element a step."""

    sides: tuple[str, ...]
    flops: int


# A step decays an element (1), adds to it (2) and reads it (2); the delta rule reads it twice (2 more), and Mamba's
# first version makes a decay for each (2 more).
RECURRENT_STATES = (
    RecurrentState(("num_v_heads", "head_k_dim", "head_v_dim"), 7),
    RecurrentState(("num_heads", "head_dim", "ssm_state_size"), 5),
    RecurrentState(("intermediate_size", "ssm_state_size"), 7),
    RecurrentState(("num_attention_heads", "head_dim", "head_dim"), 5),
)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, by its `model_type`; every default is what most architectures have."""

    model_type: str
    _: KW_ONLY

    # --- what its config.json calls things; an empty name: it does not say so; `part.key`: inside an object ---

    # Routed experts a layer, and those active per token; empty: the first of COUNT_KEYS and TOP_K_KEYS that is set.
    count_key: str = ""
    top_k_key: str = ""
    # Decoder layers.
    layers_key: str = "num_hidden_layers"
    # Inner width of an expert, likeliest first, and how many routed experts' widths the shared one has.
    width_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    shared_count_keys: tuple[str, ...] = (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
    )  # fmt: skip
    # Which layers have experts: how many come before the first; indices of those without (of all others, one in so
    # many has them), or of those with; the first and the last.
    leading_dense_keys: tuple[str, ...] = ("first_k_dense_replace", "num_dense_layers")
    dense_list_key: str = "mlp_only_layers"
    dense_period_key: str = "decoder_sparse_step"
    moe_list_key: str = ""
    moe_range_keys: tuple[str, ...] = ()
    # Inner width of the MLP in layers without experts, where one of the two lists names them.
    dense_width_key: str = "intermediate_size"
    # Groups that routing is limited to, and how many of them a token may use.
    groups_key: str = "n_group"
    groups_used_key: str = "topk_group"
    # Experts that compute nothing, numbered behind the real ones.
    identity_experts_key: str = ""
    # Factors on what the MoE block adds to the stream.
    residual_keys: tuple[str, ...] = ("residual_multiplier",)
    # Keys that it is published with and transformers passes over, and the names under which transformers reads what
    # they say: the first is given unless any is there.
    moved_keys: tuple[tuple[str, tuple[str, ...]], ...] = ()

    # --- how its router works ---

    # The child of the MoE block that routes; None: the one whose class name says so.
    router: str | None = None
    # The function that is applied to the router's logits before it selects.
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    # Which of the router's outputs, of those as wide as there are experts, are its logits.
    logits_at: int = 0
    # Its outputs hold probabilities in place of logits.
    gives_probabilities: bool = False
    # Fewest experts a group may keep, where routing is limited to groups (most add up the best two).
    min_per_group: int = 2
    # The attribute of the router that counts its rows behind those of the experts (for shared experts); empty: none.
    spare_rows: str = ""
    # The router is written for its number of experts per token.
    fixed_top_k: bool = False
    # Which gate mass the Unified-MoE-Compression code sums for this family.
    paper_gate: Literal["full", "topk"] = "full"

    # --- how its experts are held ---

    # In the MoE block: the flat matrices [experts * inner width, model width] of gate, up and (transposed) down.
    flat_experts: tuple[str, ...] = ()

    # --- what the children of a decoder layer are called; `part.child`: inside one ---

    # Norms that leave with the MoE block: the first of these groups that the layer has all of.
    moe_norms: tuple[tuple[str, ...], ...] = MOE_NORMS
    # Token mixers that attend to others, and the norms that leave with one.
    attention: tuple[str, ...] = ATTENTION
    attention_norms: tuple[str, ...] = ("input_layernorm", "operator_norm", "post_attention_layernorm")
    # Dense MLPs, and MLPs that run beside the MoE block on the same input.
    dense: tuple[str, ...] = ("mlp", "mlps", "feed_forward")
    beside: tuple[str, ...] = ("shared_mlp",)
    # The layer's own factors of the stream past its MoE block and past its attention.
    moe_factors: tuple[str, ...] = ()
    attention_factors: tuple[str, ...] = ()
    # What a layer or mixer without attention over all tokens calls its kind, and the states of such mixers.
    recurrent_kinds: tuple[str, ...] = ("linear_attention", "conv", "mamba")
    recurrent_states: tuple[RecurrentState, ...] = RECURRENT_STATES
    # Its attention is counted roughly: convolutions inside, or caches of which some tokens are compressed.
    rough_attention: bool = False
    # How many values the MoE block returns, and the attention.
    block_outputs: int = 1
    attention_outputs: int = 2
    # A norm, a convolution or streams side by side stand between the experts and the stream: their share is not known.
    normed_output: bool = False
    # Gate and up of the shared experts, which are stored apart, are one matrix in memory.
    joins_shared: bool = False

    # --- what can be done with it ---

    # Whether vLLM and llama.cpp's converter know its experts by the names that are written here.
    vllm: bool = False
    llama_cpp: bool = False
    # Whether a tiny model of it is among the tests.
    tested: bool = False
    # Architectures without experts that have its attention and norms and one MLP a layer, likeliest first; itself,
    # where its own config can say that no layer has experts.
    dense_as: tuple[str, ...] = ()
    # Why experts cannot be changed; why it cannot even be read; the architecture that expresses it while it is read
    # (checkpoints/deepseek_v1.py).
    no_expert_edits: str | None = None
    refused: str | None = None
    read_as: str | None = None


def _sigmoid(model_type: str, **more: Any) -> Family:
    return Family(model_type, router_scores="sigmoid", **more)


_ALL: dict[str, Any] = {"tested": True, "vllm": True, "llama_cpp": True}
_SIGMOID = (
    "axk1", "axk2", "bailing_hybrid", "deepseek_v32", "dots3_note_text", "flint", "glm4_moe_lite", "hy_v3",
    "kimi_linear", "laguna", "solar_open",
)  # fmt: skip
_INKLING2 = (
    "its layers attend to the streams between earlier ones, which its model gathers outside them, and no layer can run "
    "or go by itself"
)
_ENTRIES = (
    *map(_sigmoid, _SIGMOID),
    _sigmoid("afmoe", normed_output=True, tested=True),
    _sigmoid("beam", normed_output=True),
    Family(
        "dbrx",
        count_key="ffn_config.moe_num_experts",
        top_k_key="ffn_config.moe_top_k",
        layers_key="n_layers",
        width_keys=("ffn_config.ffn_hidden_size",),
        moved_keys=(("attn_config.rope_theta", ("rope_theta", "rope_parameters")),),
        flat_experts=("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"),
        moe_norms=(("norm_attn_norm.norm_2",),),
        attention=("norm_attn_norm.attn",),
        attention_norms=("norm_attn_norm.norm_1",),
        **_ALL,
    ),
    # transformers cannot build it.
    Family("deepseek", paper_gate="topk", read_as="qwen2_moe"),
    Family("deepseek_v2", paper_gate="topk", min_per_group=1, dense_as=("deepseek_v2",), **_ALL),
    _sigmoid("deepseek_v3", paper_gate="topk", dense_as=("deepseek_v3",), **_ALL),
    # Its first layers look their experts up in a table of token ids, and keep them all.
    Family("deepseek_v4", normed_output=True, rough_attention=True, tested=True),
    _sigmoid("dots1", dense_as=("dots1",), **_ALL),
    Family(
        "ernie4_5_moe",
        moe_range_keys=("moe_layer_start_index", "moe_layer_end_index"),
        dense_as=("ernie4_5",),
        **_ALL,
    ),
    _sigmoid("exaone_moe", tested=True),
    Family("flex_olmo", normed_output=True, dense_as=("olmo2",), tested=True, vllm=True),
    Family(
        "gemma4_text",
        top_k_key="top_k_experts",
        router="router",
        gives_probabilities=True,
        fixed_top_k=True,
        normed_output=True,
    ),
    _sigmoid("glm4_moe", dense_as=("glm4_moe",), **_ALL),
    _sigmoid("glm5_next_text", attention_outputs=3, normed_output=True),
    _sigmoid("glm_moe_dsa", attention_outputs=3, tested=True),
    Family("gpt_oss", block_outputs=2, **_ALL),
    Family("granitemoe", dense_as=("granite",), **_ALL),
    Family("granitemoeshared", dense_as=("granite",), tested=True, vllm=True),
    Family("hunyuan_v1_moe", dense_as=("hunyuan_v1_dense",), tested=True),
    _sigmoid("hy_v4", attention_outputs=3, normed_output=True, tested=True),
    *(Family(name, refused=_INKLING2) for name in ("inkling2", "inkling2_text")),
    _sigmoid("inkling_text", spare_rows="n_shared_experts", normed_output=True, rough_attention=True, tested=True),
    Family("jamba", **_ALL),
    Family(
        "jetmoe",
        tested=True,
        no_expert_edits="its attention is routed by the same expert count as its MLP, so neither can be cut alone",
    ),
    _sigmoid("kolibri1", normed_output=True),
    _sigmoid("lfm2_moe", tested=True, llama_cpp=True),
    _sigmoid(
        "llama4_text",
        logits_at=1,
        block_outputs=2,
        moe_list_key="moe_layers",
        dense_width_key="intermediate_size_mlp",
        tested=True,
    ),
    Family(
        "longcat_flash",
        layers_key="num_layers",
        width_keys=("expert_ffn_hidden_size",),
        identity_experts_key="zero_expert_num",
        tested=True,
        no_expert_edits="its zero-computation experts share the router's numbering with the routed ones",
    ),
    Family(
        "minimax",
        residual_keys=("mlp_beta_factor",),
        moe_factors=("mlp_alpha_factor",),
        attention_factors=("attn_alpha_factor",),
        tested=True,
    ),
    _sigmoid("mimo_v2_flash", tested=True),
    _sigmoid("minimax_m2", **_ALL),
    _sigmoid("mistral_large4_text", attention_outputs=3),
    _sigmoid("minimax_m3_vl_text", joins_shared=True),
    Family("mixtral", dense_as=("mistral",), **_ALL),
    _sigmoid("nemotron_h", tested=True),
    Family("olmoe", **_ALL),
    Family("phimoe", fixed_top_k=True, **_ALL),
    # Qwen2 has biases in its attention, which Qwen2-MoE need not have.
    Family("qwen2_moe", dense_as=("qwen2", "llama"), **_ALL),
    Family("qwen3_moe", dense_as=("qwen3",), **_ALL),
    Family("qwen3_next", dense_as=("qwen3_next",), **_ALL),
    Family(
        "zaya",
        tested=True,
        block_outputs=2,
        rough_attention=True,
        no_expert_edits="its router has a row for skipping all experts behind theirs, which no edit here keeps yet",
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ENTRIES}
ALIASES = {family.model_type: family.read_as for family in _ENTRIES if family.read_as}
REFUSED = {family.model_type: family.refused for family in _ENTRIES if family.refused}

# Architectures without experts that a family may be made: all that is known of them is who loads them.
_DENSE = ("ernie4_5", "granite", "hunyuan_v1_dense", "llama", "mistral", "olmo2", "qwen2", "qwen3")
DENSE: dict[str, Family] = {name: Family(name, vllm=True, llama_cpp=True) for name in _DENSE}

# Where a model that was re-expressed says what it was, and one whose experts became one MLP a layer.
ORIGIN_KEY = "reexpressed_from"
DENSE_KEY = "made_dense_from"


def family_of(config: PreTrainedConfig) -> Family:
    """The family entry of a config, completed from the config's own keys; of one that was made dense, as it is.

    Raises ValueError for an architecture that has no experts or is known not to work, with the reason.
    """
    config = config.get_text_config()
    family = entry_of(config)
    if family.refused:
        raise ValueError(f"{family.model_type} is not supported: {family.refused}.")
    stored = vars(config)  # asked for often: to_dict() would copy everything
    count_key = family.count_key or next((k for k in COUNT_KEYS if stored.get(k)), "")
    top_k_key = family.top_k_key or next((k for k in TOP_K_KEYS if stored.get(k)), "")
    if made_dense_from(config):
        return family
    if not count_key or not top_k_key:
        raise ValueError(
            f"{family.model_type} is not a Mixture-of-Experts architecture that is known here: its config has none of "
            f"{', '.join(COUNT_KEYS)} or none of {', '.join(TOP_K_KEYS)}."
        )
    origin = FAMILIES.get(getattr(config, ORIGIN_KEY, ""), family)
    return replace(family, count_key=count_key, top_k_key=top_k_key, paper_gate=origin.paper_gate)


def experts_per_token(config: PreTrainedConfig) -> int:
    """Experts that a token uses in a layer; the most, where the config lists them layer by layer (Hunyuan).

    0 for a model that was made dense.
    """
    if made_dense_from(config):
        return 0
    said = setting(config.get_text_config(), family_of(config).top_k_key)
    return int(max(said) if isinstance(said, list | tuple) else said)


def made_dense_from(config: PreTrainedConfig) -> str:
    """The architecture whose experts became one MLP a layer of this model; empty for all others."""
    return str(getattr(config.get_text_config(), DENSE_KEY, ""))


def setting(config: Any, key: str, default: Any = None) -> Any:
    """What a config (or its values) says under a key; `part.key`: what an object in it says."""
    for name in key.split("."):
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if found is None:
            return default
        config = found
    return config


def with_settings(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values with others under these keys; `part.key`: inside an object."""
    changed = dict(values)
    for key, value in found.items():
        part, _, inner = key.partition(".")
        changed[part] = with_settings(changed.get(part) or {}, {inner: value}) if inner else value
    return changed


def family_named(model_type: str) -> Family:
    """What is known of an architecture by its name alone."""
    return FAMILIES.get(model_type) or DENSE.get(model_type) or Family(model_type)


def entry_of(config: PreTrainedConfig) -> Family:
    """The same, of a config's architecture: of a wrapper's language model; of an edited model, the one it was."""
    config = config.get_text_config()
    return family_named(getattr(config, "moe_compress", {}).get("base_model_type", config.model_type))


def groups_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(number of router groups, groups a token may use); (1, 1) where routing is not limited to groups."""
    config = config.get_text_config()
    if getattr(config, "topk_method", None) == "greedy":
        return 1, 1
    family = entry_of(config)
    groups = getattr(config, family.groups_key, None) or 1
    return (groups, getattr(config, family.groups_used_key, None) or groups) if groups > 1 else (1, 1)
