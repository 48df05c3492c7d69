"""compressed-tensors' own schemes that engines serve: zero points, FP8 and int8 with rounded activations, NVFP4.

Each is a format to write; what is written is read as compressed-tensors. O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from moe_compress.checkpoints.formats.compressed_schemes import ALIKE, integers, refuses, scheme_config
from moe_compress.checkpoints.formats.compressed_tensors import packed_parts
from moe_compress.checkpoints.formats.element_layouts import ElementWeight, Fp4Weight
from moe_compress.checkpoints.formats.float_codes import e2m1_octets
from moe_compress.checkpoints.formats.registry import (
    CodedMatrix,
    Format,
    Packing,
    Request,
    Writer,
    storage_format,
)

EIGHT = {"num_bits": 8, "symmetric": True}
# Every row of activations is rounded by its own largest number.
TOKENS = {"strategy": "token", "dynamic": True, **EIGHT}
NVFP4: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
NVFP4 |= {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}


def elements(matrix: CodedMatrix) -> ElementWeight:
    """Codes and scales as they are."""
    return ElementWeight(matrix.scale_OG.contiguous(), matrix.codes_OI.contiguous())


def fp4_parts(matrix: CodedMatrix) -> Fp4Weight:
    """Codes in half bytes, E4M3 scales and what divides them."""
    assert matrix.divisor is not None
    octets = e2m1_octets(matrix.codes_OI.float())
    return Fp4Weight(matrix.scale_OG.contiguous(), octets, matrix.divisor.reshape(1))


def fp4_parts_with_inputs(matrix: CodedMatrix) -> Fp4Weight:
    """The same with what divides the scales of inputs."""
    assert matrix.input_divisor is not None
    return replace(fp4_parts(matrix), input_divisor=matrix.input_divisor.reshape(1))


def only(bits: int, request: Request) -> str:
    """Why a format of one width does not hold what is asked for; empty if it does."""
    return refuses(request) if request.bits == bits else f"holds {bits} bits (bits={bits})"


def _rows(packing: Packing, _group_size: int, type: str) -> dict[str, Any]:
    return {**EIGHT, "type": type, "strategy": "channel", "dynamic": False}


@storage_format("asymmetric")
def asymmetric() -> Format:
    """Whole numbers with a zero point for every group: `pack-quantized` of compressed-tensors, not symmetric."""
    config = functools.partial(scheme_config, weights=functools.partial(integers, symmetric=False))
    return Format(writer=Writer(parts=packed_parts, numbers="asymmetric", config=config, shared=ALIKE, refuses=refuses))


@storage_format("int8", implies={"bits": "8", "group_size": 0})
def int8() -> Format:
    """8 bits with a scale a row, activations rounded to 8 bits as they pass (W8A8)."""
    return Format(
        writer=Writer(
            parts=elements,
            inputs=0,
            config=functools.partial(
                scheme_config,
                weights=functools.partial(_rows, type="int"),
                inputs={**TOKENS, "type": "int"},
                format="int-quantized",
            ),
            refuses=functools.partial(only, 8),
        )
    )


@storage_format("fp8-dynamic", implies={"bits": "8", "group_size": 0})
def fp8_dynamic() -> Format:
    """FP8 with a scale a row, activations rounded to FP8 as they pass."""
    return Format(
        writer=Writer(
            parts=elements,
            numbers="fp8",
            inputs=0,
            config=functools.partial(
                scheme_config,
                weights=functools.partial(_rows, type="float"),
                inputs={**TOKENS, "type": "float"},
                format="float-quantized",
            ),
            refuses=functools.partial(only, 8),
        )
    )


def _nvfp4(inputs: dict[str, Any] | None) -> Writer:
    weights = {**NVFP4, "dynamic": False}
    return Writer(
        parts=fp4_parts if inputs is None else fp4_parts_with_inputs,
        numbers="nvfp4",
        inputs=NVFP4["group_size"],
        config=functools.partial(
            scheme_config, weights=lambda _packing, _size: weights, inputs=inputs, format="nvfp4-pack-quantized"
        ),
        refuses=functools.partial(only, 4),
    )


@storage_format("nvfp4", implies={"group_size": 16})
def nvfp4() -> Format:
    """NVFP4, weights and activations: those in groups as they pass, under a number that calibration text tells."""
    return Format(writer=_nvfp4({**NVFP4, "dynamic": "local"}))


@storage_format("nvfp4a16", implies={"group_size": 16})
def nvfp4a16() -> Format:
    """NVFP4: FP4 with an E4M3 scale for 16 inputs and a number for every matrix; activations as they are."""
    return Format(writer=_nvfp4(None))
