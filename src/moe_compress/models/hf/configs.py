"""config.json values and config objects: read, checked, and where a wrapper keeps those of its language model.

A wrapper is a language model among other towers (vision, audio), which text never enters. Its config holds one of the
language model's own; everything that is asked about layers, experts or words is asked of that one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.models.families import entry_of, family_named, setting, with_settings
from moe_compress.models.hf.config_checks import KERNELS, require_consistent, require_plausible
from moe_compress.models.hf.edited_architectures import edited_classes_of
from moe_compress.models.modeling import edited_model
from moe_compress.utils.devices import DTYPES


def read_values(path: Path) -> dict[str, Any]:
    """The values of a config.json (or of the folder that holds it), special floats decoded."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except RecursionError as error:
        raise ValueError(f"the config.json in {path} nests too deeply.") from error
    return {**values, **{name: setting(values, key) for key, name in moved(values).items()}}


def moved(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys of config.json values that transformers passes over -> those under which it would read what they say."""
    keys = family_named(str(values.get("model_type"))).moved_keys
    return {
        key: names[0] for key, names in keys if setting(values, key) is not None and values.keys().isdisjoint(names)
    }


def is_architecture(model_type: Any) -> bool:
    """Whether transformers has an architecture of this name (or an edited one of ours)."""
    return isinstance(model_type, str) and model_type.removeprefix(edited_model.PREFIX) in CONFIG_MAPPING


def known_keys(model_type: str) -> set[str]:
    """What a config of an architecture says by itself, whatever it was made of."""
    return set(CONFIG_MAPPING[model_type]().to_dict())


def encode_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values with infinities and NaN in transformers' own JSON notation."""
    return PreTrainedConfig._encode_special_floats(dict(values))


# What says so, which may list every expert: transformers copies and prints it many times over.
PACKED = "quantization_config"


def config_from(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config object of config.json values, without how weights are packed. ValueError for values of no model."""
    require_plausible(values)
    model_type = values.get("model_type")
    if model_type is None:
        raise ValueError("config.json names no model_type, so nothing can tell which architecture this is.")
    base_type = str(model_type).removeprefix(edited_model.PREFIX)
    if model_type not in CONFIG_MAPPING and base_type in CONFIG_MAPPING:  # registered after this package was imported
        CONFIG_MAPPING.register(model_type, edited_classes_of(base_type)[0])
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {model_type!r} is not an architecture of transformers {transformers.__version__}."
        )
    plain = {key: value for key, value in values.items() if key not in (PACKED, *KERNELS)}
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(plain))
    if is_wrapper(config) and not _text_key(values):
        raise ValueError(
            f"config.json of {model_type}, a language model among other towers, holds none of {', '.join(TEXT_KEYS)}, "
            "which says what the language model is."
        )
    require_consistent(config.get_text_config())
    return config


def stored_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which config.json values say that weights are stored; bf16 where they do not say."""
    inner = next((each for key in TEXT_KEYS if isinstance(each := setting(values, key), Mapping)), {})
    said = (each.get(key) for each in (values, inner) for key in ("dtype", "torch_dtype"))
    return DTYPES.get(str(next(filter(None, said), "bfloat16")), torch.bfloat16)


def num_layers(config: PreTrainedConfig) -> int:
    """How many decoder layers a config stands for (extra prediction layers behind them are not counted)."""
    return int(getattr(config.get_text_config(), entry_of(config).layers_key))


# --- wrappers -----------------------------------------------------------------------------------------------

# Under which key a wrapper's config.json holds the values of its language model; `part.key`: inside one of its models.
TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config.text_config")


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Whether the architecture is a language model among other towers."""
    return config.get_text_config() is not config


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the language model alone: all of them, but for a wrapper."""
    return dict(setting(values, key)) if (key := _text_key(values)) else dict(values)


def with_text_values(values: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values with others in place of the language model's."""
    return with_settings(values, {key: dict(text)}) if (key := _text_key(values)) else dict(text)


def _text_key(values: Mapping[str, Any]) -> str | None:
    """Under which key a wrapper holds its language model's values; any other architecture may have such a key, too."""
    model_type = str(values.get("model_type"))
    inner = getattr(CONFIG_MAPPING[model_type], "sub_configs", ()) if model_type in CONFIG_MAPPING else ()
    known = (key for key in TEXT_KEYS if key.partition(".")[0] in inner)
    return next((key for key in known if isinstance(setting(values, key), Mapping)), None)


def passes_over(config: PreTrainedConfig, name: str) -> bool:
    """Whether the architecture's class of transformers passes over a stored tensor of this name."""
    patterns = getattr(auto_class(config)._model_mapping[type(config)], "_keys_to_ignore_on_load_unexpected", None)
    return any(re.search(pattern, name) for pattern in patterns or ())


def auto_class(config: PreTrainedConfig, towers: bool = True) -> Any:
    """The auto class by which stock transformers loads such a checkpoint whole, a wrapper's towers among it.

    towers: whether a wrapper's are there at all; some are published without them. Raises ValueError for an
    architecture that transformers has no such class for.
    """
    wrapped = is_wrapper(config) and towers
    for kind in (AutoModelForMultimodalLM, AutoModelForCausalLM) if wrapped else (AutoModelForCausalLM,):
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(
        f"{config.model_type} is no causal language model of transformers {transformers.__version__}: it has a config "
        "for it, but no class that predicts words."
    )
