"""Weights that files hold as several tensors, read as the numbers they stand for, and moved as bytes.

Whole codes and scales: the layouts of compressed-tensors and of GPTQ. Floating-point codes, scales of blocks: FP8 as
DeepSeek-V3 is published, MXFP4 as GPT-OSS is. O outputs, I inputs, G groups of inputs, W words, E experts, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compress.checkpoints.formats.compressed_tensors import PackedWeight
from moe_compress.checkpoints.formats.fp8 import Fp8Weight
from moe_compress.checkpoints.formats.gptq import GptqWeight
from moe_compress.checkpoints.formats.mxfp4 import Mxfp4Weight
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

# What a matrix of another kind of packing has beside its codes: it is not read.
FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")

LAYOUTS: dict[str, tuple[type[StoredWeight], ...]] = {
    "compressed-tensors": (PackedWeight,),
    "gptq": (GptqWeight,),
    "fp8": (Fp8Weight,),
    "mxfp4": (Mxfp4Weight,),
}


def stored_parts(name: str, weight: StoredWeight) -> dict[str, Any]:
    """A weight by the names of its tensors."""
    return {f"{weight.stem(name)}{end}": part for end, part in weight.parts().items()}


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json alone knows of its stored weights, for their classes: bits, or the size of blocks.

    bits: the width of all packed matrices, where there is one: narrow matrices do not tell 3 bits from 4.
    """
    config = values.get("quantization_config") or {}
    if config.get("quant_method") == "fp8":
        return {"block": tuple(config["weight_block_size"])}
    if config.get("quant_method") == "mxfp4":
        return {}
    groups = config.get("config_groups", {}).values()
    found = {config.get("bits"), *(group["weights"]["num_bits"] for group in groups if group.get("weights"))} - {None}
    return {"bits": found.pop()} if len(found) == 1 else {}


def with_weights(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with one StoredWeight in place of its parts, as the config `values` say they are stored.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    config, settings = values.get("quantization_config"), settings_of(values)
    if not config:
        signs = tuple(layout.SIGN for layouts in LAYOUTS.values() for layout in layouts)
        packed = next((name for name in tensors if name.endswith(signs)), None)
        if packed is not None:
            raise ValueError(f"{packed} is packed, but config.json has no quantization_config that says how.")
        return dict(tensors)
    layouts, found = LAYOUTS[config["quant_method"]], dict(tensors)
    for name in tensors:
        if name.endswith(FOREIGN):
            stem, _, last = name.rpartition(".")
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or symmetric weights.")
        for layout in layouts:
            if not name.endswith(layout.SIGN):
                continue
            stem = name.removesuffix(layout.SIGN)
            parts = [f"{stem}{end}" for end in layout.NAMES]
            absent = [part for part in parts if part not in tensors]
            if absent:
                raise ValueError(f"{absent[0]} is missing beside {name}: fetch the checkpoint again.")
            held = [found.pop(part) for part in parts]
            found[f"{stem}{layout.END}"] = layout(*held, **settings)
    return found
