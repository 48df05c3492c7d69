"""Packed weights in files, in compressed-tensors' `pack-quantized` layout, read as the numbers they stand for.

A matrix `X.weight` is three tensors: `X.weight_packed`, `X.weight_scale` and `X.weight_shape`. O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.model.packed import WORD, dequantized, unpack

WEIGHT = ".weight"
PARTS = ("packed", "scale", "shape")
# What a matrix of another kind of packing has beside these: it is not read.
FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
METHOD, FORMAT = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix, whose parts are read when they are asked for; `[...]` is its weights, in the scales' dtype."""

    packed: Any
    scale: Any
    shape: Any

    def __getitem__(self, _everything: Any) -> Tensor:
        """The weights [O, I]."""
        codes_OI, scale_OG, _ = self.codes()
        return dequantized(codes_OI, scale_OG)

    def codes(self) -> tuple[Tensor, Tensor, int]:
        """Signed codes int8 [O, I], scales [O, G] and bits."""
        words_OW, scale_OG = self.packed[...], self.scale[...]
        inputs = int(self.shape[...][1])
        bits = words_OW.shape[1] * WORD // inputs
        return unpack(words_OW, bits, inputs), scale_OG, bits

    def get_dtype(self) -> str:
        """As a safetensors slice says it."""
        return "F32"


def stored_parts(name: str, parts: PackedWeight) -> dict[str, Any]:
    """A matrix by the names of its parts."""
    return {f"{name}_{part}": getattr(parts, part) for part in PARTS}


def with_weights(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with one PackedWeight in place of three parts.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in FOREIGN:
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or symmetric weights.")
        part = last.removeprefix("weight_")
        if part not in PARTS:
            found[name] = tensor
        elif part == "packed":
            whole = f"{stem}{WEIGHT}"
            absent = [f"{whole}_{other}" for other in PARTS if f"{whole}_{other}" not in tensors]
            if absent:
                raise ValueError(f"{absent[0]} is missing beside {name}: fetch the checkpoint again.")
            found[whole] = PackedWeight(*(tensors[f"{whole}_{each}"] for each in PARTS))
    return found


def packed_parts(codes_OI: Tensor, scale_OG: Tensor, words_OW: Tensor) -> PackedWeight:
    """The parts of a matrix in memory."""
    return PackedWeight(words_OW, scale_OG.contiguous(), torch.tensor(codes_OI.shape))


def require_readable(folder: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantized checkpoint in a layout that is not read."""
    config = values.get("quantization_config")
    if not config:
        return
    kind, layout = config.get("quant_method", "quantized"), config.get("format", "")
    if (kind, layout) == (METHOD, FORMAT):
        return
    stored = " ".join([kind, layout]).strip()
    raise ValueError(
        f"{folder} is stored in {stored} format, which is not read: use a bf16 or fp32 copy, or {METHOD} {FORMAT}."
    )
