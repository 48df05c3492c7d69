"""Model types that only their own code knows, and whose class transformers has under another type (Kimi-K2).

They are read as that type once their settings are those that its class computes by; that their tensors are its tensors,
by name and by shape, is checked when the checkpoint is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_compress.models import hf


@dataclass(frozen=True, slots=True)
class Familiar:
    """What transformers calls a class's type.

    settings: what it computes by, where a config says so; renamed: keys that it has under another name.
    """

    model_type: str
    settings: Mapping[str, Any]
    renamed: Mapping[str, str] = field(default_factory=dict)


FAMILIAR = {
    "DeepseekV3ForCausalLM": Familiar(
        "deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    ),
    "HunYuanMoEV1ForCausalLM": Familiar(
        "hunyuan_v1_moe",
        {"use_qk_norm": True, "use_cla": False, "use_mla": False, "norm_topk_prob": True, "norm_type": "rms"},
        {"attention_head_dim": "head_dim"},
    ),
}


def familiar_type(values: Mapping[str, Any]) -> Familiar | None:
    """What a config of a type that transformers does not know is read as; None for all others."""
    architectures = values.get("architectures")
    if hf.is_architecture(values.get("model_type")) or not isinstance(architectures, list):
        return None
    return FAMILIAR.get(architectures[0]) if len(architectures) == 1 and isinstance(architectures[0], str) else None


def known_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the name that transformers has for their type. ValueError for settings that it has not."""
    familiar = familiar_type(values)
    if familiar is None:
        return dict(values)
    for key, needed in familiar.settings.items():
        if values.get(key, needed) != needed:
            raise ValueError(
                f"model_type {values.get('model_type')!r} is read as {familiar.model_type}, but its config says "
                f"{key}={values[key]}, where only {needed} is."
            )
    found = {familiar.renamed.get(key, key): value for key, value in values.items() if key != "auto_map"}
    return {**found, "model_type": familiar.model_type}


def require_same_tensors(folder: Any, values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise ValueError unless the stored tensors are those of the type that they are read as.

    stored: shapes by name, None for a matrix that is packed; without tensors that predict further tokens.
    """
    model = hf.skeleton(hf.config_from(values), torch.bfloat16)
    made = hf.checkpoint_tensors(model, model.state_dict())
    tied = set(model.all_tied_weights_keys)
    odd = [name for name in stored if name not in made] or [
        name
        for name, tensor in made.items()
        if (name not in stored and name not in tied) or stored.get(name) not in (None, tuple(tensor.shape))
    ]
    if odd:
        raise ValueError(
            f"{folder} is read as {values['model_type']}, but its tensors are others: {sorted(odd)[0]}, of {len(odd)}."
        )
