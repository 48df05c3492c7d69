"""Multi-token-prediction layers: what checkpoints call them, and how many of them a config says there are.

They stand behind the model's own layers and predict further tokens. No causal language model of transformers runs
them, so what is known of them is names: a number behind the last layer's, or a module called `mtp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NAMED = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
# How families say how many there are; MiniMax also says whether there are any.
PREDICTION_COUNT = "num_nextn_predict_layers"
COUNTS = (
    PREDICTION_COUNT, "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules", "use_mtp",
)  # fmt: skip


def module_pattern(key: str, layer: int | None) -> str:
    """A pattern of the names of all modules of a tensor's prediction layer; `layer`: its number among the model's."""
    return r"(?:.*\.)?mtp(?:_\w+)?\..*" if layer is None else rf".*layers\.{layer}\..*"


def predicts_further(key: str) -> bool:
    """Whether a tensor lies in a module of prediction layers (others are only told by their layer's number)."""
    return NAMED.search(key) is not None


def prediction_layers(values: Mapping[str, Any]) -> int:
    """How many prediction layers a config speaks of; 0 where it speaks of none."""
    nested = (prediction_layers(value) for value in values.values() if isinstance(value, Mapping))
    return max((int(values[key]) for key in COUNTS if isinstance(values.get(key), int)), default=0) or max(
        nested, default=0
    )


def without_prediction_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same config values, saying that there are none."""
    return {key: _without(key, value) for key, value in values.items()}


def _without(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_prediction_layers(value)
    return type(value)(0) if key in COUNTS and isinstance(value, int) else value
