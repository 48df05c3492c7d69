"""Published configs made small: the pattern of layers, the names and the towers are kept, all sizes are few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import architectures
import families
from moe_compress.checkpoints.familiar_types import known_values
from moe_compress.models import hf
from moe_compress.models.prediction_layers import without_prediction_layers


def shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values of a small model of the same kind, in plain numbers."""
    plain = hf.with_text_values(values, _plain(hf.text_values(values)))
    known = known_values(_plain(plain))
    own = families.OWN.get(known["model_type"], {})
    small = architectures.small_values(known, lambda text: {**_sizes(text), **own})
    return without_prediction_layers({**small, "torch_dtype": "float32", "dtype": "float32"})


def save(values: Mapping[str, Any], folder: Path) -> Path:
    """A random model of these values, under the names that transformers gives to its tensors."""
    config = hf.config_from(values)
    with hf.quiet():
        model = hf.auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    return folder


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("quantization_config", "auto_map")}


def _sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    """Small sizes; as many heads of keys as of queries where the model has that."""
    found = families.sizes_of(text)
    queries, keys = "num_attention_heads", "num_key_value_heads"
    return {**found, keys: found[queries]} if keys in text and text[keys] == text.get(queries) else found
