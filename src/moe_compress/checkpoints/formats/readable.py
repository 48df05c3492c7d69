"""What config.json says of packed weights: whether they can be read at all, and whether the files agree with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_compress.checkpoints.formats.compressed_tensors import PackedWeight, _packed
from moe_compress.checkpoints.formats.fp8 import _fp8
from moe_compress.checkpoints.formats.gptq import GptqWeight, _gptq
from moe_compress.models.modeling.bit_packing import WORD

READ = "compressed-tensors pack-quantized, gptq (symmetric, without act-order), fp8 in blocks, mxfp4"
QUANTIZATION = "quantization_config"


def require_readable(folder: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantized checkpoint in a layout that is not read, saying why."""
    config = values.get(QUANTIZATION)
    if not config:
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"{folder}: the quantization_config of config.json is no object.")
    kind = str(config.get("quant_method", "quantized"))
    checks = {"compressed-tensors": _packed, "gptq": _gptq, "fp8": _fp8, "mxfp4": lambda _: ""}
    reason = checks[kind](config) if kind in checks else "which is not read"
    if reason:
        stored = " ".join([kind, str(config.get("format", ""))]).strip()
        raise ValueError(f"{folder} is stored in {stored} format, {reason}: use a bf16 or fp32 copy, or {READ}.")


def require_agreement(folder: Any, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if a packed matrix has other bits, or scales for other groups, than config.json says."""
    schemes = _schemes(values.get(QUANTIZATION) or {})
    for name, entry in tensors.items():
        if not isinstance(entry, PackedWeight):
            continue
        scales, words = entry.scale.shape, entry.words.shape
        if isinstance(entry, GptqWeight):
            scales, words = scales[::-1], words[::-1]
        if len(scales) != 2 or len(words) != 2 or scales[0] != words[0] or not _fits(scales[1], words[1], schemes):
            said = ", or ".join(f"{bits} bits in groups of {group_size or 'a row'}" for bits, group_size in schemes)
            raise ValueError(
                f"{name} in {folder} has scales {list(entry.scale.shape)} and codes {list(entry.words.shape)}: that is "
                f"not {said}, as config.json says."
            )


def _fits(groups: int, words: int, schemes: list[tuple[int, int]]) -> bool:
    return any(
        groups == 1 if not group_size else words == math.ceil(groups * group_size * bits / WORD)
        for bits, group_size in schemes
    )


def _schemes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, inputs that share a scale; 0: a whole row) of all that is packed."""
    if config.get("quant_method") == "gptq":
        return [(config["bits"], max(config["group_size"], 0))]
    weights = [group["weights"] for group in config.get("config_groups", {}).values()]
    return [(each["num_bits"], each.get("group_size") or 0) for each in weights]
