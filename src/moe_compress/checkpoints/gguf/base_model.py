"""Whether a GGUF file is of the model that a plan was made for: by the numbers that both of them say, and by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedConfig

from moe_compress.checkpoints.gguf.architectures import architecture_of, spelled
from moe_compress.checkpoints.gguf.cut import decoder_layers
from moe_compress.checkpoints.gguf.library import gguf_library
from moe_compress.checkpoints.gguf.reader import GgufModel
from moe_compress.models import hf
from moe_compress.models.families import ORIGIN_KEY, entry_of, family_of, setting
from moe_compress.utils.logging import log

NAME = "general.name"
# What a plan says of its model -> what GGUF calls it, after the architecture's name.
NUMBERS = {"experts": "expert_count", "hidden_size": "embedding_length"}


def shape_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What tells a model from others, as a plan keeps it."""
    family = family_of(config)
    return {
        "model_type": model_type_of(config),
        "layers": hf.num_layers(config),
        "hidden_size": config.get_text_config().hidden_size,
        "experts": setting(config.get_text_config(), family.count_key, 0),
    }


def model_type_of(config: PreTrainedConfig) -> str:
    """The published architecture, whatever it was re-expressed as or edited into."""
    return str(getattr(config, ORIGIN_KEY, "") or entry_of(config).model_type)


def llama_cpp_architecture(model_type: str) -> str:
    """What llama.cpp calls an architecture. ValueError if it has none."""
    found = architecture_of(model_type, [*gguf_library().MODEL_ARCH_NAMES.values()])
    if found is None:
        raise ValueError(f"llama.cpp, as the installed gguf package knows it, has no architecture for {model_type}.")
    return found


def require_base_model(model: GgufModel, base: Mapping[str, Any], shape: Any, any_model: bool) -> None:
    """Raise ValueError for a file of another shape, or (unless any_model) of another name, than the plan's model."""
    if not isinstance(shape, dict) or not shape.keys() >= {"model_type", "layers", *NUMBERS}:
        raise ValueError(f"the plan says {shape} of its model's shape: remove that, or make the plan anew.")
    expected = {"architecture": llama_cpp_architecture(str(shape["model_type"])), "layers": shape["layers"]}
    found = {"architecture": model.architecture, "layers": decoder_layers(model)}
    for key, name in NUMBERS.items():
        expected[key], found[key] = shape[key], model.number(name)
    differs = [f"{key} {found[key]}, not {expected[key]}" for key in expected if found[key] != expected[key]]
    if differs:
        raise ValueError(
            f"the plan was made for {base['model']}, and {model.path} is another model: {'; '.join(differs)}."
        )
    _require_name(model, str(base["model"]), any_model)


def _require_name(model: GgufModel, made_for: str, any_model: bool) -> None:
    """A name is free text: alike but for punctuation, perhaps behind an owner's; none at all is let pass."""
    entry = model.metadata.get(NAME)
    wanted = spelled(PurePath(made_for).name)
    if entry is None or not isinstance(entry.value, str) or spelled(entry.value).endswith(wanted):
        return
    sentence = f"the plan was made for {made_for}, and {model.path} calls itself {entry.value!r}"
    if not any_model:
        raise ValueError(f"{sentence}: apply it to a file of that model, or say any_model=true if it is one.")
    log.warning("%s.", sentence)
