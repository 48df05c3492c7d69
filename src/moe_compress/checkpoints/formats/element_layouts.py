"""Weights of one element a number (FP8, int8) or of two in a byte (FP4), with their scales: layouts of several formats.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.float_codes import e2m1_numbers, powers_of_two, spread
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, StoredWeight
from moe_compress.models.modeling.bit_packing import pack

INT8 = "I8"
OCTETS = ("F8_E4M3", INT8)
BYTE = 8


@dataclass(frozen=True, slots=True)
class ElementWeight(PackedWeight):
    """`X.weight` FP8 or int8 [O, I] with `X.weight_scale` of the matrix, its rows, groups of inputs, or blocks.

    int8 with one scale a row stays packed in memory. Scales that are bytes are powers of two (MXFP8). The numbers come
    in the dtype of the scales, fp32 for bytes. block: outputs and inputs of a block.
    """

    scale: Any
    elements: Any
    zeros: Any = None
    input_scale: Any = None
    block: tuple[int, int] | None = field(default=None, kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".weight_zero_point", ".input_scale")
    SIGN: ClassVar[str] = ".weight_scale"

    @classmethod
    def reads(cls, dtypes: Mapping[str, str]) -> bool:
        """Whether the weight is one of elements."""
        return dtypes.get(".weight") in OCTETS

    @property
    def stays_packed(self) -> bool:
        """Where torch has a kernel for it: whole numbers with one scale a row."""
        rows = list(self.scale.get_shape() if hasattr(self.scale, "get_shape") else self.scale.shape)
        dtype = self.elements.get_dtype() if hasattr(self.elements, "get_dtype") else self.elements.dtype
        return self.zeros is None and str(dtype) in (INT8, "torch.int8") and len(rows) == 2 and rows[1] == 1 < rows[0]

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """Words int32 [O, W], scales [O, 1], bits and inputs."""
        codes_OI = self.elements[...]
        return pack(codes_OI, BYTE), self.scale[...], BYTE, codes_OI.shape[1]

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I]."""
        elements_OI, scale = self.elements[...], self.scale[...]
        scale = powers_of_two(scale) if scale.dtype == torch.uint8 else scale
        shape = elements_OI.shape
        number_OI = elements_OI.to(scale.dtype)
        if self.zeros is not None:
            number_OI = number_OI - spread(self.zeros[...].to(scale.dtype), shape, self.block)
        return number_OI * spread(scale, shape, self.block)


@dataclass(frozen=True, slots=True)
class Fp4Weight(StoredWeight):
    """`X.weight_packed` of E2M1 codes [O, I / 2] and `X.weight_scale` [O, G]: NVFP4 of compressed-tensors, and MXFP4.

    NVFP4 has E4M3 scales of 16 inputs, which `X.weight_global_scale` divides; MXFP4 powers of two of 32.
    """

    scale: Any
    octets: Any
    divisor: Any = None
    input_divisor: Any = None

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight_packed")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".weight_global_scale", ".input_global_scale")
    SIGN: ClassVar[str] = ".weight_packed"
    DTYPES: ClassVar[tuple[str, ...]] = ("U8", "torch.uint8")

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I], in bf16 as the library makes them."""
        scale_OG = self.scale[...]
        scale_OG = powers_of_two(scale_OG) if scale_OG.dtype == torch.uint8 else scale_OG.float()
        if self.divisor is not None:
            scale_OG = scale_OG / self.divisor[...].float()
        number_OI = e2m1_numbers(self.octets[...])
        return (number_OI * spread(scale_OG, number_OI.shape)).bfloat16()
