"""Edited architectures become known to transformers once its auto classes are imported, by whomever and whenever.

Importing transformers takes seconds, and most of what imports this package never needs it; yet stock
`AutoModelForCausalLM` has to know edited checkpoints after `import moe_compress`, whichever of the two came first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
# As in models/modeling/edited_model.py, which cannot be imported without torch.
PREFIX = "moe_compress_"


def register_edited_architectures() -> None:
    """Register now if transformers' auto classes are there, else as soon as they are."""
    if AUTO_CONFIG in sys.modules:
        _register(sys.modules[AUTO_CONFIG])
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


def _register(auto_config: ModuleType) -> None:
    """A stand-in config for every architecture; imports none of them."""
    for base_type in auto_config.CONFIG_MAPPING_NAMES:
        auto_config.CONFIG_MAPPING.register(PREFIX + base_type, _stand_in_config(base_type), exist_ok=True)


def _stand_in_config(base_type: str) -> type:
    """What AutoConfig finds under an edited model_type: it makes the real classes when first used."""

    def from_dict(values: Mapping[str, Any], **kwargs: Any) -> Any:
        architectures = importlib.import_module("moe_compress.models.hf.edited_architectures")
        return architectures.edited_classes_of(base_type)[0].from_dict(values, **kwargs)

    body = {"model_type": PREFIX + base_type, "from_dict": staticmethod(from_dict), "__module__": __name__}
    return type("EditedConfig", (), body)


class _AfterAutoConfig(MetaPathFinder):
    """Finds nothing itself: it lets one module be imported as ever, and registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader registers once it has run the module."""
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
