"""Activations of 8 bits: every row rounded to whole numbers from -127 to 127, with a scale of its own.

Scales are those of the row at hand, not of a calibration (dynamic, per token: arXiv 2206.01861). Shipped inside
edited checkpoints, so it needs torch alone. R rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 127
# On an experts module: what of its rows is rounded, "sent" (what experts are sent) or "experts" (all they multiply).
ROUNDS = "rounds"
# Below so many rows CUDA's integer product is not there.
CUDA_ROWS = 32


def row_codes(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., I] and scales fp32 [..., 1] of rows; a row of zeros has the scale 0."""
    wide_RI = x_RI.float()
    scale_R1 = wide_RI.abs().amax(-1, keepdim=True) / LEVELS
    return (wide_RI / scale_R1.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale_R1


def rounded(x_RI: Tensor) -> Tensor:
    """Rows as their codes say them, in their own dtype. Rounding once more changes nothing but last bits."""
    codes_RI, scale_R1 = row_codes(x_RI)
    return (codes_RI * scale_R1).to(x_RI.dtype)


def rounding_of(module: nn.Module) -> str:
    """What of an experts module's rows is rounded; empty for nothing."""
    return str(module.__dict__.get(ROUNDS, ""))


def round_inputs(linear: nn.Module) -> None:
    """Let a linear map round the rows that it is given."""
    if not linear.__dict__.get(ROUNDS):
        linear.__dict__[ROUNDS] = "inputs"
        linear.register_forward_pre_hook(_rounded_first)


def _rounded_first(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rounded(args[0]), *args[1:])


def integer_product(x_RI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Rounded rows times a matrix of 8-bit codes, summed up in whole numbers: [R, O] in the rows' dtype."""
    code_RI, scale_R1 = row_codes(x_RI)
    rows = len(code_RI)
    if code_RI.is_cuda and rows < CUDA_ROWS:
        code_RI = torch.nn.functional.pad(code_RI, (0, 0, 0, CUDA_ROWS - rows))
    sum_RO = torch._int_mm(code_RI, codes_OI.T)[:rows]
    return (sum_RO * scale_R1 * scale_O.float()).to(x_RI.dtype)
