"""MXFP4: E2M1 codes, a power of two for 32 of them, as GPT-OSS is published.

E experts, O outputs, I inputs, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.registry import Format, Grid, Loaders, storage_format
from moe_compress.checkpoints.formats.stored_weight import StackedWeight

# Numbers of 4 bits with 2 of exponent, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127
BITS, BLOCK = 4, 32


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
        octets, exponent_EOB = self.codes[...], self.scale[...].int() - E8M0_BIAS
        value = torch.tensor([*E2M1, *(-number for number in E2M1)])
        number = torch.stack([value[(octets & 15).int()], value[(octets >> 4).int()]], -1).flatten(-2)
        return torch.ldexp(number, exponent_EOB.unsqueeze(-1)).flatten(-2).transpose(1, 2).bfloat16()


@storage_format("mxfp4", written=False)
def mxfp4() -> Format:
    """Floating-point numbers of 4 bits; families that publish in it keep experts in one stack a layer."""
    return Format(
        layouts=(Mxfp4Weight,),
        described="mxfp4",
        grids=lambda _: [Grid(bits=BITS, group_size=BLOCK, kinds=("experts",))],
        scale_bytes=lambda _: 1.0,
        loaders=Loaders(),
    )
