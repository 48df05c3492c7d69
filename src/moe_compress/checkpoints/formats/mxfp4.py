"""MXFP4: E2M1 codes, a power of two for 32 of them, as GPT-OSS is published.

E experts, O outputs, I inputs, B blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moe_compress.checkpoints.formats.compressed_schemes import scheme_config
from moe_compress.checkpoints.formats.element_layouts import Fp4Weight
from moe_compress.checkpoints.formats.float_codes import e2m1_numbers, e2m1_octets, exponents, powers_of_two
from moe_compress.checkpoints.formats.grid import Grid
from moe_compress.checkpoints.formats.registry import (
    CodedMatrix,
    Config,
    Format,
    Loaders,
    Writer,
    leave_out_modules,
    storage_format,
)
from moe_compress.checkpoints.formats.served_schemes import only
from moe_compress.checkpoints.formats.stored_weight import StackedWeight

BITS, BLOCK = 4, 32
# As compressed-tensors says it of matrices that are stored one by one.
MX = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": BLOCK}
MX |= {"scale_dtype": "torch.uint8"}


@dataclass(frozen=True, slots=True)
class Mxfp4Weight(StackedWeight):
    """All experts' matrices [E, O, I]: blocks of 32 inputs with a power of two each, two codes a byte (GPT-OSS).

    Its numbers come as the model computes with them, [E, I, O], in bf16, which holds them exactly.
    """

    scale: Any
    codes: Any

    NAMES: ClassVar[tuple[str, ...]] = ("_scales", "_blocks")
    SIGN: ClassVar[str] = "_blocks"
    END: ClassVar[str] = ""

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [E, I, O]."""
        number_EOBI, scale_EOB = e2m1_numbers(self.codes[...]), powers_of_two(self.scale[...])
        return (number_EOBI * scale_EOB.unsqueeze(-1)).flatten(-2).transpose(1, 2).bfloat16()


def _grids(config: Config) -> list[Grid]:
    """The experts of all layers but those that are left out by name."""
    return [
        Grid(bits=BITS, group_size=BLOCK, ignore=tuple(config.get("modules_to_not_convert") or ()), kinds=("experts",))
    ]


def _parts(matrix: CodedMatrix) -> Fp4Weight:
    return Fp4Weight(exponents(matrix.scale_OG), e2m1_octets(matrix.codes_OI.float()))


def _writer(inputs: dict[str, Any] | None) -> Writer:
    """Matrices stored one by one, in compressed-tensors' words. inputs: how engines round activations."""
    weights = {**MX, "dynamic": False}
    return Writer(
        parts=_parts,
        numbers="mxfp4",
        inputs=BLOCK,
        config=functools.partial(
            scheme_config, weights=lambda _packing, _size: weights, inputs=inputs, format="mxfp4-pack-quantized"
        ),
        refuses=functools.partial(only, BITS),
    )


@storage_format("mxfp4a16", implies={"group_size": BLOCK})
def mxfp4a16() -> Format:
    """MXFP4, activations as they are."""
    return Format(writer=_writer(None))


@storage_format("mxfp4", implies={"group_size": BLOCK})
def mxfp4() -> Format:
    """MXFP4: FP4 with a power of two for 32 inputs, weights and activations; GPT-OSS publishes stacks of experts so."""
    return Format(
        layouts=(Mxfp4Weight,),
        described="mxfp4",
        grids=_grids,
        leave_out=leave_out_modules,
        scale_bytes=lambda _config, _itemsize: {BITS: 1.0},
        kept_by_stock=True,
        loaders=Loaders(),
        writer=_writer({**MX, "dynamic": True}),
    )
