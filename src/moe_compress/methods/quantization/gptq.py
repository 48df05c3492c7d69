"""GPTQ (arXiv 2210.17323) for many matrices at once: round column by column, the columns behind make up for it.

B experts, O outputs, I inputs, G groups of inputs, R rows of all matrices of an expert that share their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.methods.column_solver import compensate, inputs_first, inverse_factor, revived
from moe_compress.methods.quantization.grid import Clip
from moe_compress.methods.quantization.numbers import Numbers, found_scales

Solved = tuple[Tensor, Tensor, Tensor | None]


def gptq(
    weights: Sequence[Tensor],
    gram_BII: Tensor,
    numbers: Numbers,
    group: int,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    clip: Clip = "mse",
    act_order: bool = False,
    damping: float = 0.01,
    divisor_B: Tensor | None = None,
) -> tuple[list[Solved], list[int]]:
    """Codes [B, O, I], scales and zero points [B, O, G] of each matrix, and for whom the damping was raised.

    gram_BII: second moments of the inputs; divisor_B: of NVFP4's scales. Scales are found when a group's first column
    is reached; with `act_order`, which takes inputs by their moments, before any of them, in the order of the file, and
    so where rows share them. Weights that are zero stay zero. Raises ValueError for a Gram matrix that no damping makes
    definite.
    """
    importance_BI = gram_BII.float().diagonal(dim1=1, dim2=2).clone()
    gram_BII, _ = revived(gram_BII.float())
    weight_BIR = inputs_first(weights)
    grid = _Grid(numbers, group, dtype, clip, importance_BI, divisor_B)
    order_BI = None
    if act_order or numbers.outputs > 1:
        straight_BI = torch.arange(weight_BIR.shape[1], device=weight_BIR.device).expand_as(importance_BI)
        order_BI = importance_BI.argsort(dim=1, descending=True, stable=True) if act_order else straight_BI
        grid.fix_scales(weight_BIR, weights, order_BI)
        gram_BII = _sorted(_sorted(gram_BII, order_BI).transpose(1, 2), order_BI)
        weight_BIR = _sorted(weight_BIR, order_BI)
    factor_BII, raised = inverse_factor(gram_BII, names, damping)
    grid.begin(weight_BIR)
    compensate(weight_BIR, factor_BII, grid, 1 if order_BI is not None else min(group, weight_BIR.shape[1]))
    codes_BIR = grid.codes_BIR
    if order_BI is not None:
        codes_BIR = _sorted(codes_BIR.view(torch.int8), order_BI.argsort(1)).view(codes_BIR.dtype)
    sizes = [weight.shape[1] for weight in weights]
    scale_BGR = grid.scale_BGR if numbers.own_scales else grid.scale_BGR.to(dtype)
    found = [codes_BIR, scale_BGR, grid.zero_BGR]
    by_matrix = [[None] * len(sizes) if t is None else t.transpose(1, 2).split(sizes, 1) for t in found]
    return [_contiguous(*each) for each in zip(*by_matrix, strict=True)], raised


def _contiguous(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Solved:
    return codes.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()


def _sorted(table_BIX: Tensor, order_BI: Tensor) -> Tensor:
    """Rows in another order, for each expert its own."""
    return table_BIX.gather(1, order_BI.unsqueeze(2).expand_as(table_BIX))


class _Grid:
    """Rounds column after column and keeps the codes."""

    def __init__(
        self,
        numbers: Numbers,
        group: int,
        dtype: torch.dtype,
        clip: Clip,
        importance_BI: Tensor,
        divisor_B: Tensor | None,
    ) -> None:
        self.numbers, self.group, self.dtype, self.clip = numbers, group, dtype, clip
        self.importance_BI, self.divisor_B = importance_BI, divisor_B
        self.place_BI: Tensor | None = None
        self.zero_BGR: Tensor | None = None

    def fix_scales(self, weight_BIR: Tensor, weights: Sequence[Tensor], order_BI: Tensor) -> None:
        """Find all scales beforehand, in groups of inputs as they lie in the file."""
        self.place_BI = order_BI // self.group
        if self.numbers.outputs == 1:
            groups = weight_BIR.shape[1] // self.group
            weight_YgR = weight_BIR.unflatten(1, (-1, self.group)).flatten(0, 1)
            weighs_Yg = self.importance_BI.unflatten(1, (-1, self.group)).flatten(0, 1)
            divisor_Y = None if self.divisor_B is None else self.divisor_B.repeat_interleave(groups)
            scale_YR, zero_YR = self.numbers.scales(weight_YgR, self.dtype, self.clip, weighs_Yg, divisor_Y)
            self.scale_BGR = scale_YR.unflatten(0, (len(weight_BIR), -1))
            self.zero_BGR = None if zero_YR is None else zero_YR.unflatten(0, (len(weight_BIR), -1))
            return
        found = [
            found_scales(self.numbers, w, self.group, self.dtype, self.clip, self.importance_BI, self.divisor_B)
            for w in weights
        ]
        self.scale_BGR = torch.cat([scale_BOG for scale_BOG, _ in found], 1).transpose(1, 2).contiguous()

    def begin(self, weight_BIR: Tensor) -> None:
        """Remember which weights are zero, and make room."""
        self.is_zero_BIR = weight_BIR == 0
        self.any_zero = bool(self.is_zero_BIR.any())
        self.codes_BIR = torch.empty_like(weight_BIR, dtype=self.numbers.code_dtype)
        if self.place_BI is None:
            experts, inputs, rows = weight_BIR.shape
            self.scale_BGR = weight_BIR.new_empty(experts, inputs // self.group, rows)

    def block(self, weight_BIR: Tensor, start: int, stop: int) -> None:
        """Nothing is decided by blocks."""

    def column(self, weight_BIR: Tensor, i: int) -> Tensor:
        """The column on its grid."""
        g = i // self.group
        if self.place_BI is None and i % self.group == 0:
            self._find(weight_BIR, g)
        scale_BR, zero_BR = self._of_column(self.scale_BGR, i), None
        if self.zero_BGR is not None:
            zero_BR = self._of_column(self.zero_BGR, i)
        code_BR = self.numbers.codes(weight_BIR[:, i], scale_BR, zero_BR)
        if self.any_zero:
            code_BR = torch.where(self.is_zero_BIR[:, i], 0.0 if zero_BR is None else zero_BR, code_BR)
        self.codes_BIR[:, i] = code_BR.to(self.numbers.code_dtype)
        return (code_BR if zero_BR is None else code_BR - zero_BR) * scale_BR

    def _find(self, weight_BIR: Tensor, g: int) -> None:
        """The scales of a group of inputs that begins."""
        here = slice(g * self.group, (g + 1) * self.group)
        scale_BR, zero_BR = self.numbers.scales(
            weight_BIR[:, here], self.dtype, self.clip, self.importance_BI[:, here], self.divisor_B
        )
        self.scale_BGR[:, g] = scale_BR
        if zero_BR is not None:
            self.zero_BGR = torch.zeros_like(self.scale_BGR) if self.zero_BGR is None else self.zero_BGR
            self.zero_BGR[:, g] = zero_BR

    def _of_column(self, table_BGR: Tensor, i: int) -> Tensor:
        if self.place_BI is None:
            return table_BGR[:, i // self.group]
        return table_BGR[torch.arange(len(table_BGR), device=table_BGR.device), self.place_BI[:, i]]
