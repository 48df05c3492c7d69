"""Edited architectures: registered beside the ordinary ones, and the files that let them load anywhere."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moe_compress.models import modeling
from moe_compress.models.families import family_named
from moe_compress.models.modeling import edited_model

MODELLING_FILE = "modeling_moe_compress"
# Auto classes of what goes with a model's weights, whose code is copied with them.
PROCESSORS = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")

# Every file of the package but its `__init__`, which says nothing that a checkpoint needs.
SHIPPED = sorted(path for path in Path(modeling.__file__).parent.glob("*.py") if path.name != "__init__.py")


def _classes(base_type: str) -> tuple[Any, Any]:
    """The config and causal-language-model classes of an architecture."""
    config_class = CONFIG_MAPPING[base_type]
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


@functools.cache
def edited_classes_of(base_type: str) -> tuple[Any, Any]:
    """The config and model classes of an architecture's edited checkpoints; registers them."""
    classes = edited_model.edited_classes(*_classes(base_type), family_named(base_type).flat_experts)
    AutoModelForCausalLM.register(*classes)
    return classes


def edited_config_values(base: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values of an edited checkpoint, which never loads as the original architecture."""
    config_class, model_class = edited_classes_of(base["model_type"])
    return {
        **base,
        "model_type": config_class.model_type,
        "architectures": [model_class.__name__],
        "auto_map": {**base.get("auto_map", {}), **auto_map_of(base["model_type"])},
        "moe_compress": {**manifest, "base_architectures": base.get("architectures")},
    }


def auto_map_of(base_type: str) -> dict[str, str]:
    """Where the config of an edited checkpoint says its classes are."""
    config_class, model_class = edited_classes_of(base_type)
    return {
        "AutoConfig": f"{MODELLING_FILE}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{MODELLING_FILE}.{model_class.__name__}",
    }


def modelling_files(values: Mapping[str, Any]) -> dict[str, str]:
    """The Python files that an edited checkpoint carries, by name; none for a plain one."""
    if "moe_compress" not in values:
        return {}
    shipped = {path.name: path.read_text(encoding="utf-8") for path in SHIPPED}
    return {f"{MODELLING_FILE}.py": loader_of(values["moe_compress"]["base_model_type"]), **shipped}


def loader_of(base_type: str, module: str = "edited_model") -> str:
    """The file that makes an architecture's edited classes, by the module that knows how."""
    config_class, model_class = _classes(base_type)
    flat = "".join(f", {names}" for names in [family_named(base_type).flat_experts] if names).replace("'", '"')
    return f'''"""{model_class.__name__} with layers that differ, as its config.json says under `moe_compress`."""

from {config_class.__module__} import {config_class.__name__}
from {model_class.__module__} import {model_class.__name__}

from .{module} import edited_classes

Edited{config_class.__name__}, Edited{model_class.__name__} = edited_classes(
    {config_class.__name__}, {model_class.__name__}{flat}
)
'''
