"""Numbers and words of a config.json that no model has: found before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_compress.models.families import COUNT_KEYS, TOP_K_KEYS, Family, groups_of
from moe_compress.utils.choices import nearest

# The least and the most that numbers may be, far beyond all that was ever published: above it, a config would take
# minutes or all of the memory to be told that it is not real.
_LAYERS, _WIDTH, _HEADS, _EXPERTS, _WORDS = (1, 1_000), (1, 1 << 20), (1, 1 << 13), (0, 1 << 15), (1, 1 << 24)
RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "kv_lora_rank"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _HEADS),
    **dict.fromkeys(COUNT_KEYS, _EXPERTS),
    **dict.fromkeys((*TOP_K_KEYS, *Family("").shared_count_keys), _EXPERTS),
    "vocab_size": _WORDS,
    "num_labels": _WORDS,
    "max_position_embeddings": (1, 1 << 31),
    "num_nextn_predict_layers": (0, 1_000),
}
# Any other whole number: token ids and seeds are smaller, widths and counts far smaller.
LARGEST = 1 << 40
# What has to be there as something else than a number.
SHAPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "name of an architecture"),
    "architectures": (list, "list of names of classes"),
    "auto_map": (Mapping, "object that names classes"),
    **dict.fromkeys(("dtype", "torch_dtype"), (str, "name of a type of numbers")),
}
# Words that mostly name one of transformers' own functions, by the key that holds them.
KNOWN: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation"), ACT2FN),
    "rope_type": {"default": None, **ROPE_INIT_FUNCTIONS},
}


def require_plausible(values: Mapping[str, Any]) -> None:
    """Raise ValueError for config.json values that describe no model, before a config is made of them."""
    for key, (kind, what) in SHAPES.items():
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise ValueError(f"config.json says {key}={values[key]!r}, which is no {what}.")
    model_type = values.get("model_type") or "known"
    for place, key, value in _entries(values, ""):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"config.json says {place}=NaN, which is no number.")
        if isinstance(value, int) and not isinstance(value, bool):
            low, high = RANGES.get(key, (-LARGEST, LARGEST))
            if not low <= value <= high:
                raise ValueError(
                    f"config.json says {place}={value}: no {model_type} model is like that "
                    f"({low} to {high} are possible)."
                )


def unknown_word(values: Mapping[str, Any], error: str) -> str:
    """The word that an error is about when a model was built of the values, as the rest of a sentence; empty for none.

    Some architectures have functions of their own, so that a word alone says nothing.
    """
    for place, key, value in _entries(values, ""):
        if key in KNOWN and isinstance(value, str) and value not in KNOWN[key] and value in error:
            near = nearest(value, KNOWN[key])
            hint = f" (did you mean {near!r}?)" if near else ""
            return f"transformers has no function for {place}={value!r}{hint}"
    return ""


def _entries(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(full name, key, value) of all that is no object; of lists, each member."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield from ((f"{prefix}{key}", str(key), each) for each in (value if isinstance(value, list) else [value]))


def require_consistent(config: PreTrainedConfig) -> None:
    """Raise ValueError for numbers of a language model that contradict each other."""
    stored = vars(config)
    heads, groups = stored.get("num_attention_heads"), stored.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(
            f"config.json says {heads} attention heads and {groups} key-value heads: each of these serves equally many."
        )
    experts = next((stored[key] for key in COUNT_KEYS if isinstance(stored.get(key), int)), 0)
    all_groups, used = groups_of(config)
    if experts and (experts % all_groups or not 1 <= used <= all_groups):
        raise ValueError(
            f"config.json says {experts} experts in {all_groups} groups, of which a token uses {used}: no router can."
        )
    for key in TOP_K_KEYS:
        active = stored.get(key)
        if experts and isinstance(active, int) and not 1 <= active <= experts:
            raise ValueError(f"config.json says {key}={active}, but there are {experts} experts: 1 to {experts}.")
