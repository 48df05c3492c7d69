"""Writes docs/families.md: what works with which family, asked of the checks that a recipe's dry run makes.

    python scripts/docs/families.py [PAGE]

Every tested family is built small, without weights, from its config's defaults; each recipe is tried on it, and the
config that it would leave is built and compared.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from architectures import Small, default_values, lists, small_values
from moe_compress.compression.dry_run import dry_run
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES, Family, with_settings
from moe_compress.recipes.parser import parse
from moe_compress.utils.files import atomic_write

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LAYERS = 4
# One recipe a column.
RECIPES = {
    "expert_drop": "expert_drop keep=4",
    "expert_merge": "expert_merge keep=4",
    "layer_drop": "layer_drop drop=1",
    "layer_drop part=attention": "layer_drop drop=1 part=attention",
    "block_drop": "block_drop drop=1",
    "top_k": "top_k k=1",
    "skip": "skip",
    "channels": "channels ratio=0.5",
    "factorise": "factorise ratio=0.6",
    "densify": "densify",
    "prune": "prune",
    "activations": "activations where=experts",
    "quantize format=compressed-tensors": "quantize bits=4 format=compressed-tensors",
    "quantize format=gptq": "quantize bits=4 format=gptq",
    "quantize format=packed": "quantize bits=4 format=packed",
}
# Small numbers for whatever of these a config has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers"), LAYERS),
    **{"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"), 1),
    **{"attn_layer_period": 2, "attn_layer_offset": 0, "full_attention_interval": 2},
    "layers_block_type": ["moe", "attention"] * (LAYERS // 2),
}
# What else some need, because sizes in their defaults depend on each other, or because they have no experts by default.
_GEMMA: dict[str, Any] = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
_GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "num_kv_shared_layers": 0}
_GEMMA |= {"hidden_size_per_layer_input": 0, "global_head_dim": 8}
_GLM5_NEXT: dict[str, Any] = {"qk_rope_head_dim": 0, "head_dim": 0, "num_key_value_heads": 4, "linear_num_heads": 4}
_GLM5_NEXT |= {"linear_head_dim": 8, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 4, "index_kpool": 2}
# Its attention cannot be built of its defaults, which have no rope_theta.
_DBRX: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64}
_DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500_000}}
_DBRX |= {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2}}
_DOTS3: dict[str, Any] = {"per_layer_config": {}, "head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA),
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "linear_num_heads": 4, "linear_head_dim": 8},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _DOTS3),
    **dict.fromkeys(("glm5_next", "glm5_next_text"), _GLM5_NEXT),
    "dbrx": _DBRX,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", *["moe"] * (LAYERS - 1)]},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
                  | {"partial_rotary_factor": 1.0}},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "step3p7": {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Models that cannot be built of their defaults.
WHOLE: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe": {
        **dict.fromkeys(("talker_config.text_config.num_hidden_layers", "thinker_config.vision_config.depth"), 1),
        **{"talker_config.text_config.shared_expert_intermediate_size": 32, "talker_config.spatial_merge_size": 2},
    },
}
HEAD = """# Families

What works with which architecture. `python scripts/docs/families.py` makes this page of what the code's own checks
say; do not edit it. How a family is recognised, and how one is added: [extending/family.md](extending/family.md).

- **plain**: the result is an ordinary checkpoint of the family, which stock tools load.
- **edited**: its layers differ from what the architecture can say. `AutoModelForCausalLM` loads it behind
  `import moe_compress`, or with `trust_remote_code=True` ([checkpoints.md](checkpoints.md)).
- **no**: it is refused before a weight is read, for the reason under the number.

Each recipe is tried in an even form: the same count of experts, experts a token or neurons in every layer. Uneven ones
(`budget=global`, single layers) leave edited checkpoints. vLLM and llama.cpp: whether they know the family's experts by
the names in plain checkpoints. Tests run on a tiny model of each of these families. `densify` needs an architecture
without experts that has the family's attention and norms; every family that one is known of is in the table.
"""


def small_config(model_type: str) -> PreTrainedConfig:
    """A config of the architecture with few layers and narrow ones; what is no size stays as it is by default."""
    default: PreTrainedConfig = AutoConfig.for_model(model_type)
    stored = default.to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in stored} | OWN.get(model_type, {})
    if (stored.get("n_group") or 1) > 1:
        sizes |= {"n_group": 2, "topk_group": 1}
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **sizes)
    if "layer_types" in stored:
        kinds = list(config.layer_types or ["full_attention"])
        if kinds.count("full_attention") == 1:  # one of each kind in turn, or the only attention could not go
            config.layer_types = ([*dict.fromkeys(kinds)] * LAYERS)[:LAYERS]
    return config


def verdict(sentence: str, config: PreTrainedConfig, model: PreTrainedModel) -> tuple[str, str]:
    """(plain, edited or no; why not) for a recipe on a skeleton, which stays as it is."""
    try:
        found = dry_run(parse(sentence, (), {"model": config.model_type}), copy.deepcopy(model), config.to_dict())
        return ("plain" if resulting_config(found.values, found.edits).plain else "edited"), ""
    except ValueError as error:
        return "no", str(error)


def sizes_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """The small sizes for whatever of them a language model's config values have, and whole numbers of groups."""
    kept = (key for key in SIZES.keys() & text.keys() if key != "layers_block_type")
    sizes = {key: [SIZES[key]] * len(text[key]) if isinstance(text[key], list) else SIZES[key] for key in kept}
    return {**sizes, **({"n_group": 2, "topk_group": 1} if (text.get("n_group") or 1) > 1 else {})}


def attempts(model_type: str) -> list[Small]:
    """Small configs to try an architecture with: some need as many key-value heads as heads, and one width for all."""

    def small(model_type: str, **other: Any) -> PreTrainedConfig:
        own = OWN.get(model_type, {})
        values = with_settings(default_values(model_type), WHOLE.get(model_type, {}))
        return hf.config_from(small_values(values, lambda text: {**sizes_of(text), **other, **own}))

    tested = [small_config] if FAMILIES.get(model_type, Family(model_type)).tested else []
    return [*tested, small, functools.partial(small, num_key_value_heads=4)]


def refusals(config: PreTrainedConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """The recipes that are refused; most architectures have no dense one, which is no limit of what is done here."""
    tried = {name: sentence for name, sentence in RECIPES.items() if name != "densify"}
    return tuple(f"`{name}`" for name, sentence in tried.items() if verdict(sentence, config, model)[0] == "no")


def verdicts(family: Family) -> dict[str, tuple[str, str]]:
    """What becomes of every recipe."""
    config = small_config(family.model_type)
    model = hf.skeleton(config, torch.bfloat16)
    return {column: verdict(sentence, config, model) for column, sentence in RECIPES.items()}


def table(found: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """A row a family, a column a recipe, and the reasons below."""
    titles = ["family", *RECIPES, "vLLM", "llama.cpp"]
    reasons: dict[str, int] = {}
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, by_recipe in found.items():
        cells = [f"`{name}`"]
        for word, reason in by_recipe.values():
            number = reasons.setdefault(reason, len(reasons) + 1) if reason else 0
            cells.append(f"{word} ({number})" if number else word)
        cells += ["yes" if known else "no" for known in (FAMILIES[name].vllm, FAMILIES[name].llama_cpp)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def others() -> str:
    """Families with an entry, but no test."""
    untested = [family for _, family in sorted(FAMILIES.items()) if not family.tested]
    plain = [f"`{f.model_type}`" for f in untested if not (f.refused or f.read_as or f.no_expert_edits)]
    lines = ["## Entries without a test", "", f"Without a tiny model among the tests: {', '.join(plain)}.", ""]
    lines += [f"- `{f.model_type}`: read as `{f.read_as}`." for f in untested if f.read_as]
    lines += [f"- `{f.model_type}`: experts stay, {f.no_expert_edits}." for f in untested if f.no_expert_edits]
    lines += [f"- `{f.model_type}`: refused, {f.refused}." for f in untested if f.refused]
    return "\n".join([*lines, "", "Any other architecture of transformers works without an entry if it is recognised."])


def page() -> str:
    """The whole page."""
    found = {name: verdicts(family) for name, family in sorted(FAMILIES.items()) if family.tested}
    return "\n".join([HEAD, table(found), "", lists(attempts, refusals, OWN), "", others(), ""])


if __name__ == "__main__":
    atomic_write(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE, page().encode())
