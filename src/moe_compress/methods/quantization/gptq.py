"""GPTQ (arXiv 2210.17323) for many matrices at once: round column by column, the columns behind make up for it.

B experts, O outputs, I inputs, G groups of inputs, R rows of all matrices of an expert that share their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.methods.column_solver import compensate, inputs_first, inverse_factor, revived
from moe_compress.methods.quantization.grid import Clip, group_scale, rounded_codes


def gptq(
    weights: Sequence[Tensor],
    gram_BII: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    clip: Clip = "mse",
    act_order: bool = False,
    damping: float = 0.01,
) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Codes int8 [B, O, I] and scales [B, O, G] of each matrix, and the experts for which the damping was raised.

    gram_BII: second moments of the inputs. Scales are found when a group's first column is reached; with `act_order`,
    which takes inputs by their moments, before any of them, in the order of the file. Weights that are zero stay zero.
    Raises ValueError for a Gram matrix that no damping makes definite.
    """
    importance_BI = gram_BII.float().diagonal(dim1=1, dim2=2).clone()
    gram_BII, _ = revived(gram_BII.float())
    weight_BIR = inputs_first(weights)
    grid = _Grid(bits, group, dtype, clip, importance_BI)
    order_BI = None
    if act_order:
        order_BI = importance_BI.argsort(dim=1, descending=True, stable=True)
        grid.fix_scales(weight_BIR, order_BI)
        gram_BII = _sorted(_sorted(gram_BII, order_BI).transpose(1, 2), order_BI)
        weight_BIR = _sorted(weight_BIR, order_BI)
    factor_BII, raised = inverse_factor(gram_BII, names, damping)
    grid.begin(weight_BIR)
    compensate(weight_BIR, factor_BII, grid, 1 if act_order else min(group, weight_BIR.shape[1]))
    codes_BIR, scale_BGR = grid.codes_BIR, grid.scale_BGR
    if order_BI is not None:
        codes_BIR = _sorted(codes_BIR, order_BI.argsort(1))
    sizes = [weight.shape[1] for weight in weights]
    codes = codes_BIR.transpose(1, 2).split(sizes, 1)
    scales = scale_BGR.transpose(1, 2).to(dtype).split(sizes, 1)
    return [(c.contiguous(), s.contiguous()) for c, s in zip(codes, scales, strict=True)], raised


def _sorted(table_BIX: Tensor, order_BI: Tensor) -> Tensor:
    """Rows in another order, for each expert its own."""
    return table_BIX.gather(1, order_BI.unsqueeze(2).expand_as(table_BIX))


class _Grid:
    """Rounds column after column and keeps the codes."""

    def __init__(self, bits: int, group: int, dtype: torch.dtype, clip: Clip, importance_BI: Tensor) -> None:
        self.bits, self.group, self.dtype, self.clip = bits, group, dtype, clip
        self.importance_BI = importance_BI
        self.place_BI: Tensor | None = None

    def fix_scales(self, weight_BIR: Tensor, order_BI: Tensor) -> None:
        """Find all scales beforehand, in groups of inputs as they lie in the file."""
        weight_YgR = weight_BIR.unflatten(1, (-1, self.group)).flatten(0, 1)
        importance_Yg = self.importance_BI.unflatten(1, (-1, self.group)).flatten(0, 1)
        scale_YR = group_scale(weight_YgR, self.bits, self.dtype, self.clip, importance_Yg)
        self.scale_BGR = scale_YR.unflatten(0, (len(weight_BIR), -1))
        self.place_BI = order_BI // self.group

    def begin(self, weight_BIR: Tensor) -> None:
        """Remember which weights are zero, and make room."""
        self.zero_BIR = weight_BIR == 0
        self.any_zero = bool(self.zero_BIR.any())
        self.codes_BIR = torch.empty_like(weight_BIR, dtype=torch.int8)
        if self.place_BI is None:
            experts, inputs, rows = weight_BIR.shape
            self.scale_BGR = weight_BIR.new_empty(experts, inputs // self.group, rows)

    def block(self, weight_BIR: Tensor, start: int, stop: int) -> None:
        """Nothing is decided by blocks."""

    def column(self, weight_BIR: Tensor, i: int) -> Tensor:
        """The column on its grid."""
        g = i // self.group
        if self.place_BI is None and i % self.group == 0:
            here = slice(i, i + self.group)
            importance_Bg = self.importance_BI[:, here]
            self.scale_BGR[:, g] = group_scale(weight_BIR[:, here], self.bits, self.dtype, self.clip, importance_Bg)
        if self.place_BI is None:
            scale_BR = self.scale_BGR[:, g]
        else:
            scale_BR = self.scale_BGR[torch.arange(len(weight_BIR), device=weight_BIR.device), self.place_BI[:, i]]
        code_BR = rounded_codes(weight_BIR[:, i], scale_BR, self.bits)
        if self.any_zero:
            code_BR.masked_fill_(self.zero_BIR[:, i], 0)
        self.codes_BIR[:, i] = code_BR.to(torch.int8)
        return code_BR * scale_BR
