"""What a weight method is given and gives back. B experts (or 1), O outputs, I inputs, G groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_compress.models.modeling.bit_packing import dequantized


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """Matrices of one layer that see the same inputs, as a method is given them.

    names: of the B experts (or the one matrix), for messages; weights: [B, O, I] each; moment: mean squares of the
    inputs [B, I] or their mean outer products [B, I, I], None where the method asked for neither; sparsity_B: of the
    weights of each, what the allocation says, None where it says nothing; bits: the same for quantization, B widths of
    each matrix; group_size: inputs that share a scale; stored: what scales are stored in.
    """

    names: list[str]
    weights: list[Tensor]
    moment: Tensor | None = None
    sparsity_B: Tensor | None = None
    bits: list[list[int]] | None = None
    group_size: int = 0
    stored: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class QuantizedMatrices:
    """Codes int8 [B, O, I] of `bits` each, and their scales [B, O, G] in the dtype that is stored."""

    codes: Tensor
    scale: Tensor
    bits: list[int]

    def dense(self) -> Tensor:
        """The weights that they stand for, in the scales' dtype."""
        return dequantized(self.codes, self.scale)


@dataclass(frozen=True, slots=True)
class NewMatrices:
    """The matrices that come out, [B, O, I] each, and for which of the B something has to be reported.

    quantized: their codes, where they are on a grid.
    """

    weights: list[Tensor]
    notes: dict[str, list[int]] = field(default_factory=dict)
    quantized: list[QuantizedMatrices] = field(default_factory=list)
