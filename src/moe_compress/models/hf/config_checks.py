"""Numbers and words of a config.json that no model has: found before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_compress.models.families import COUNT_KEYS, TOP_K_KEYS, Family, entry_of, groups_of, setting
from moe_compress.utils.choices import nearest

# The least and the most that numbers may be, far beyond all that was ever published: above it, a config would take
# minutes or all of the memory to be told that it is not real.
_LAYERS, _WIDTH, _HEADS, _EXPERTS, _WORDS = (1, 1_000), (1, 1 << 20), (1, 1 << 13), (0, 1 << 15), (1, 1 << 24)
WINDOWS = ("sliding_window", "attention_chunk_size")
LAYERS_KEYS = ("num_hidden_layers", "num_layers", "n_layers")
MOST_EXPERTS = 1 << 18
RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(LAYERS_KEYS, _LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), _WIDTH),
    **dict.fromkeys(("d_model", "ffn_hidden_size"), _WIDTH),
    "head_dim": (0, 1 << 20),  # of GLM-5-Next, whose heads have no part that turns, 0
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "kv_n_heads"), _HEADS),
    **dict.fromkeys(COUNT_KEYS, _EXPERTS),
    **dict.fromkeys((*TOP_K_KEYS, "moe_top_k", *Family("").shared_count_keys), _EXPERTS),
    "vocab_size": _WORDS,
    "num_labels": _WORDS,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), (1, 1 << 31)),
    "num_nextn_predict_layers": (0, 1_000),
    **dict.fromkeys(WINDOWS, (0, 1 << 31)),
}
MOST_LABELS = 10_000
# Any number, but above 0 and finite.
POSITIVE = ("rope_theta", "factor", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps", "routed_scaling_factor")
# How stock transformers is told of weights under another name, and of a function of attention, which may be the hub's.
ELSEWHERE, KERNELS = "transformers_weights", ("attn_implementation", "_attn_implementation")
# Any other whole number: token ids and seeds are smaller, widths and counts far smaller.
LARGEST = 1 << 40
# What has to be there as something else than a number.
SHAPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "name of an architecture"),
    "architectures": (list, "list of names of classes"),
    "auto_map": (Mapping, "object that names classes"),
    **dict.fromkeys(("dtype", "torch_dtype"), (str, "name of a type of numbers")),
    "per_layer_config": (Mapping, "object of layers"),
}
# Words that mostly name one of transformers' own functions, by the key that holds them.
KNOWN: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation"), ACT2FN),
    "rope_type": {"default": None, **ROPE_INIT_FUNCTIONS},
}


def require_plausible(values: Mapping[str, Any]) -> None:
    """Raise ValueError for config.json values that describe no model, before a config is made of them."""
    _require_shapes(values)
    try:
        entries = list(_entries(values, ""))
    except RecursionError as error:
        raise ValueError("config.json nests too deeply.") from error
    for place, key, value in entries:
        said = f"config.json says {place}={value!r}"
        if key in KERNELS and isinstance(value, str) and "/" in value:
            raise ValueError(f"{said}: no checkpoint chooses what code is fetched and run.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if key in WINDOWS and value == 0 and values.get("use_sliding_window", True):
                raise ValueError(f"{said}, a window of no token: a number above 0 is needed, or null.")
            _require_possible(place, key, value, values.get("model_type") or "known")
    _require_few_experts(values)


def _require_shapes(values: Mapping[str, Any]) -> None:
    """Raise ValueError for values that are of another kind than the key asks for, or too many."""
    for key, (kind, what) in SHAPES.items():
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise ValueError(f"config.json says {key}={values[key]!r}, which is no {what}.")
    if not all(isinstance(name, str) for name in values.get("architectures") or ()):
        raise ValueError("config.json says architectures, but not all of them are names of classes.")
    if values.get(ELSEWHERE):
        raise ValueError(f"config.json says {ELSEWHERE}={values[ELSEWHERE]!r}: weights of other names are not read.")
    if len(values.get("id2label") or ()) > MOST_LABELS:
        raise ValueError(f"config.json names {len(values['id2label'])} labels: no language model has more than a few.")


def _require_possible(place: str, key: str, value: float, model_type: str) -> None:
    """Raise ValueError for a number that no model has under this key."""
    if math.isnan(value):
        raise ValueError(f"config.json says {place}=NaN, which is no number.")
    if key in POSITIVE and not 0 < value < math.inf:
        raise ValueError(f"config.json says {place}={value}, but a number above 0 is needed.")
    low, high = RANGES.get(key, (-LARGEST, LARGEST))
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(
            f"config.json says {place}={value}: no {model_type} model is like that ({low} to {high} are possible)."
        )


def _require_few_experts(values: Mapping[str, Any]) -> None:
    """Raise ValueError for more experts in all than any model has: each takes its time."""
    layers = max((n for key in LAYERS_KEYS if isinstance(n := values.get(key), int)), default=0)
    experts = max((n for key in COUNT_KEYS if isinstance(n := values.get(key), int)), default=0)
    if layers * experts > MOST_EXPERTS:
        raise ValueError(
            f"config.json says {layers} layers of {experts} experts: no model is like that ({MOST_EXPERTS} in all are "
            "possible)."
        )
    for inner in values.values():
        if isinstance(inner, Mapping):
            _require_few_experts(inner)


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
    family = entry_of(config)
    counts = (setting(stored, key) for key in (family.count_key, *COUNT_KEYS) if key)
    experts = next((count for count in counts if isinstance(count, int)), 0)
    all_groups, used = groups_of(config)
    if experts and (experts % all_groups or not 1 <= used <= all_groups):
        raise ValueError(
            f"config.json says {experts} experts in {all_groups} groups, of which a token uses {used}: no router can."
        )
    for key in filter(None, (family.top_k_key, *TOP_K_KEYS)):
        active = setting(stored, key)
        if experts and isinstance(active, int) and not 1 <= active <= experts:
            raise ValueError(f"config.json says {key}={active}, but there are {experts} experts: 1 to {experts}.")
