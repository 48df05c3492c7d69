"""MXFP4: E2M1 codes, a power of two for 32 of them, as GPT-OSS is published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.edits.edits import PackMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices

# Numbers of 4 bits with 2 of exponent, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4Weight(StoredWeight):
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

    def experts(self, chosen: Sequence[int]) -> Mxfp4Weight:
        """The same of some experts, as they are."""
        return self.each(lambda part: part[...][list(chosen)])


MXFP4_BITS, MXFP4_SPAN = 4, 32


def _mxfp4_edits(model: PreTrainedModel) -> list[PackMatrices]:
    """All matrices of experts, which families that publish in MXFP4 keep in one stack a layer."""
    edits, family = [], family_of(model.config)
    for index, layer in enumerate(hf.decoder_layers(model)):
        stacks = {matrix.name: matrix.weight_BOI.shape for matrix in layer_matrices(layer, family, ["experts"])}
        bits = {name: (MXFP4_BITS,) * count for name, (count, _, _) in stacks.items()}
        group_sizes = {name: math.gcd(MXFP4_SPAN, inputs) for name, (_, _, inputs) in stacks.items()}
        if bits:
            edits.append(PackMatrices(index, bits, group_sizes))
    return edits
