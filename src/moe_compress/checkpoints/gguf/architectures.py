"""What llama.cpp calls the architectures, and what it takes from a layer's number alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_compress.checkpoints.gguf.reader import GgufModel

# model_type -> llama.cpp's name, where they are not spelled alike.
NAMES = {
    "bailing_moe_v2": "bailingmoe2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "kimi_k2": "deepseek2",
    "mimo_v2_flash": "mimo2",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",
    "step3p5": "step35",
}
# All layers with experts are alike, wherever they stand.
ALIKE = (
    "arctic", "bailingmoe", "bailingmoe2", "dbrx", "deepseek", "deepseek2", "dots1", "ernie4_5-moe", "glm4moe",
    "granitemoe", "grok", "hunyuan-moe", "llada-moe", "llama", "minimax-m2", "olmoe", "phimoe", "qwen2moe", "qwen3moe",
)  # fmt: skip
# One layer in so many attends to all tokens, counted from the first.
PERIODS = {"gpt-oss": 2}
# deepseek2 without a low rank of its queries is known by its number of layers.
PLAIN_QUERIES = (26, 27)
PLAIN_QUERIES_BY_VOCABULARY = (48, 128256)
# deepseek2 files of this vocabulary that do not say how their router scores: guessed from 47 or 48 layers.
GUESSED_ROUTER = 154880


def spelled(name: str) -> str:
    """Letters and digits alone, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def architecture_of(model_type: str, known: Sequence[str]) -> str | None:
    """What llama.cpp calls a `model_type`, of the names that it knows; None for an architecture that it has not."""
    name = NAMES.get(model_type, model_type.removesuffix("_text"))
    return next((each for each in known if spelled(each) == spelled(name)), None)


def require_known_kinds(model: GgufModel, kept: Sequence[int]) -> None:
    """Raise ValueError if llama.cpp would take a layer that moves up for one of another kind.

    kept: the layers that are left, by their first numbers.
    """
    name = model.architecture
    period = model.number("interleave_moe_layer_step", 1)
    if name in PERIODS:
        pattern = model.metadata.get(model.key("attention.sliding_window_pattern"))
        if pattern is None or pattern.count is None:  # else it says so of every layer
            period = PERIODS[name] if pattern is None else pattern.value
    elif name not in ALIKE:
        raise ValueError(
            f"llama.cpp tells kinds of {name}'s layers by their numbers: none of them can be dropped here."
        )
    moved = next((old for new, old in enumerate(kept) if period and (old - new) % period), None)
    if moved is not None:
        raise ValueError(
            f"llama.cpp takes one layer in {period} of {name} for another kind by its number, so layer {moved} cannot "
            f"move up to {list(kept).index(moved)}: drop layers in runs of {period}."
        )
    if name == "deepseek2":
        _require_depth(model, len(kept))


def has_plain_queries(layers: int | None, vocabulary: int | None) -> bool:
    """Whether llama.cpp takes a deepseek2 of this size for one without a low rank of its queries."""
    return layers in PLAIN_QUERIES or (layers, vocabulary) == PLAIN_QUERIES_BY_VOCABULARY


def _require_depth(model: GgufModel, depth: int) -> None:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    vocabulary = model.number("vocab_size", (tokens.count if tokens else None) or 0)
    if vocabulary == GUESSED_ROUTER and model.key("expert_gating_func") not in model.metadata:
        raise ValueError(
            f"{model.path} has no expert_gating_func, which llama.cpp then guesses from the number of layers: convert "
            "the model anew before layers are dropped."
        )
    if has_plain_queries(depth, vocabulary) == ("blk.0.attn_q_a.weight" not in model.tensors):
        return
    raise ValueError(
        "llama.cpp knows deepseek2 models without a low rank of their queries by having 26 or 27 layers, and would "
        f"not load this one with {depth}: drop fewer or more layers."
    )
