"""What config.json says of packed weights: written for compressed-tensors, and read back as edits.

Experts have one scheme, all other linear maps another: that is as far as stock loaders tell schemes apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.mxfp4 import _mxfp4_edits
from moe_compress.edits.edits import PackMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices, stored_matrices

QUANTIZATION = "quantization_config"


def packed_edits(model: PreTrainedModel, values: Mapping[str, Any]) -> list[PackMatrices]:
    """The edits that give a skeleton the room for what the config says is packed; none for a config without.

    Floating-point codes take the room of whole ones of as many bits.
    """
    config = values.get(QUANTIZATION) or {}
    if config.get("quant_method") == "mxfp4":
        return _mxfp4_edits(model)
    groups = _groups(config)
    edits, family = [], family_of(model.config)
    for index, layer in enumerate(hf.decoder_layers(model) if groups else ()):
        bits: dict[str, list[int]] = {}
        group_sizes: dict[str, int] = {}
        widths = {matrix.name: matrix.weight_BOI.shape[2] for matrix in layer_matrices(layer, family)}
        for stored, (name, _number) in stored_matrices(model, index).items():
            weights = _scheme_of(stored.removesuffix(".weight"), name, groups)
            if weights is not None and name in widths:
                bits.setdefault(name, []).append(weights["num_bits"])
                group_sizes[name] = weights.get("group_size") or widths[name]
        if bits:
            edits.append(PackMatrices(index, {name: tuple(each) for name, each in bits.items()}, group_sizes))
    return edits


def says_packed(values: Mapping[str, Any]) -> bool:
    """Whether a config says of any weights that they are packed, under stock names or in an edited architecture."""
    edits = values.get("moe_compress", {}).get("edits", ())
    return bool(values.get(QUANTIZATION)) or any(edit["edit"] == "pack_matrices" for edit in edits)


def scale_bytes(values: Mapping[str, Any]) -> float | None:
    """What a scale takes of a file, where it is not one number of the model's dtype for a group of inputs."""
    config = values.get(QUANTIZATION) or {}
    if config.get("quant_method") == "fp8":  # one in fp32 for a block of outputs as well
        return 4 / float(config["weight_block_size"][0])
    return 1.0 if config.get("quant_method") == "mxfp4" else None


def _groups(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Targets and their grids; GPTQ and FP8 pack every linear map but those that they leave out."""
    if config.get("quant_method") == "fp8":
        kept = "|".join(re.escape(name) for name in config.get("modules_to_not_convert") or ())
        target = rf"re:(?!.*(?:{kept})).*" if kept else "re:.*"
        return {"all": {"targets": [target], "weights": {"num_bits": 8, "group_size": config["weight_block_size"][1]}}}
    if config.get("quant_method") != "gptq":
        return config.get("config_groups", {})
    kept = "|".join(pattern.removeprefix("-:") for pattern in config.get("dynamic") or () if pattern.startswith("-:"))
    targets = [rf"re:(?!(?:{kept})$).*" if kept else "re:.*"]
    weights = {"num_bits": config["bits"], "group_size": max(config["group_size"], 0)}
    return {"all": {"targets": targets, "weights": weights}}


def _scheme_of(stored: str, name: str, groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for group in groups.values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target.startswith("re:") and any(re.match(pattern, each) for each in (stored, f".layers.0.{name}")):
                return group["weights"]
    return None
