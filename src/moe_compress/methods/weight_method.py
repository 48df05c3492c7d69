"""What a weight method is given and gives back, and what those that quantize tell the engine.

B experts (or 1), O outputs, I inputs, G groups of inputs, K widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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
    each matrix; group_size: inputs that share a scale; stored: what scales are stored in; numbers: on which they are
    rounded, as the storage format calls them; reach_B: the largest magnitude of each one's inputs, where seen.
    """

    names: list[str]
    weights: list[Tensor]
    moment: Tensor | None = None
    sparsity_B: Tensor | None = None
    bits: list[list[int]] | None = None
    group_size: int = 0
    stored: torch.dtype = torch.float32
    numbers: str = "int"
    reach_B: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizedMatrices:
    """Codes [B, O, I] of `bits` each, int8 or FP8, which FP4's fit in, and their scales [B, O, G] as they are stored.

    zero: codes of the weight 0 [B, O, G] where that is not 0; divisor: what the scales are divided by [B] (NVFP4);
    input_divisor: the same of the scales that engines find for the inputs.
    """

    codes: Tensor
    scale: Tensor
    bits: list[int]
    zero: Tensor | None = None
    divisor: Tensor | None = None
    input_divisor: Tensor | None = None

    def dense(self) -> Tensor:
        """The weights that they stand for, in the dtype in which they are read."""
        if self.divisor is not None:
            scale = self.scale.float() / self.divisor[:, None, None]
            return dequantized(self.codes, scale).bfloat16()
        if self.zero is None:
            return dequantized(self.codes, self.scale)
        zero_BOG1, scale_BOG1 = self.zero.to(self.scale.dtype).unsqueeze(3), self.scale.unsqueeze(3)
        number_BOGg = self.codes.to(self.scale.dtype).unflatten(2, (self.scale.shape[2], -1))
        return ((number_BOGg - zero_BOG1) * scale_BOG1).flatten(2)


@dataclass(frozen=True, slots=True)
class NewMatrices:
    """The matrices that come out, [B, O, I] each, and for which of the B something has to be reported.

    quantized: their codes, where they are on a grid.
    """

    weights: list[Tensor]
    notes: dict[str, list[int]] = field(default_factory=dict)
    quantized: list[QuantizedMatrices] = field(default_factory=list)


# --- quantization --------------------------------------------------------------------------------------------

# Fewer inputs never share a scale.
NARROWEST = 8


def group_size_for(widths: Iterable[int], wanted: int) -> int:
    """Inputs that share a scale: at most `wanted`, as many as divide all widths; 0 if fewer than NARROWEST would.

    wanted 0: one scale a row, which is said by the width itself where all are alike.
    """
    common = math.gcd(*widths)
    if not wanted:
        return common
    return next((n for n in range(min(wanted, common), NARROWEST - 1, -1) if common % n == 0), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOptions:
    """On which grid a recipe wants weights, and how they are to be stored.

    widths: bits that a weight may have, ascending; bits: of every weight, None where they are shared out; budget: the
    mean bits a weight where they are; group_size: inputs that share a scale at most, 0 for a whole row.
    """

    widths: tuple[int, ...]
    bits: int | None
    budget: float | None
    group_size: int
    format: str

    @property
    def nearest(self) -> int:
        """The width of all weights, or the one nearest to the budget."""
        wanted = self.bits or self.budget or 0.0
        return min(self.widths, key=lambda bits: abs(bits - wanted))

    def expected(self, count: int) -> tuple[int, ...]:
        """Widths of so many matrices; of those that are still to be shared out, as many as add up to the budget."""
        if self.bits is not None:
            return (self.bits,) * count
        budget = self.budget or 0.0
        low = max(bits for bits in self.widths if bits <= budget)
        high = min(bits for bits in self.widths if bits >= budget)
        wide = round(count * (budget - low) / max(high - low, 1))
        return (high,) * wide + (low,) * (count - wide)


# (layer, matrix) -> inputs that share a scale, 0 for a matrix that is left as it is.
GroupSizes = Mapping[tuple[int, str], int]
# By layer and stack of matrices: costs [E, K], and bits of each matrix.
BitCosts = Mapping[int, Mapping[str, Tensor]]
Bits = dict[int, dict[str, list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitAllocation:
    """How bits are shared out among the matrices of experts.

    widths: that are tried; rounded: weights [B, O, I], bits, group size and dtype of scales -> what they would become;
    by_use: costs [E, K] from the experts' shares of the tokens [E], for allocations that try no weights; by_gradient:
    changes count as the loss's gradient sees them; choose: costs, and weights of one matrix by layer -> bits.
    """

    widths: tuple[int, ...]
    rounded: Callable[[Tensor, int, int, torch.dtype], Tensor]
    choose: Callable[[BitCosts, Mapping[int, int]], Bits]
    by_use: Callable[[Tensor], Tensor] | None = None
    by_gradient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRescaling:
    """How inputs are made larger before weights are rounded.

    search: stacks of weights [B, O, I] with the second moments of what they see [B, I, I], mean squares of the input
    [X, I], bits, group size, dtype of scales and `pow2` -> factors [X, I]; keeps_routing: what a router reads is
    multiplied by powers of two alone, which changes no choice.
    """

    search: Callable[..., Tensor]
    keeps_routing: bool
