"""AWQ (arXiv 2306.00978): which inputs to make larger before rounding, so that what matters is rounded finest.

An input that is multiplied by s while its weights are multiplied by 1/s changes nothing but the grid. Here weights are
multiplied, and whatever makes the input is divided. B experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.methods.quantization.grid import rtn
from moe_compress.models.modeling.bit_packing import dequantized

STEPS = 20
LEAST = 1e-4


def awq_scale(
    stacks: Sequence[tuple[Tensor, Tensor]],
    moment_XI: Tensor,
    bits: int,
    group_size: int,
    stored: torch.dtype,
    *,
    pow2: bool,
) -> Tensor:
    """What the weights of every input are multiplied with, [X, I]: one vector for all experts (X = 1), or one for each.

    stacks: weights [B, O, I] that see the input, each with the second moments of what it sees [B, I, I]; moment_XI:
    mean squares of the input. s is the root mean square to the power of 0, 1/20, ..., 19/20, of which the least sum of
    tr(D gram D') is chosen, D being the change of a matrix; pow2: each rounded to a power of two.
    """
    root_XI = moment_XI.float().sqrt()
    root_XI = torch.maximum(root_XI, LEAST * root_XI.amax(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    best_XI, least_X = torch.ones_like(root_XI), root_XI.new_full((len(root_XI),), torch.inf)
    for step in range(STEPS):
        scale_XI = _even(root_XI ** (step / STEPS), pow2)
        error_X = sum(_error(weight, gram, scale_XI, bits, group_size, stored) for weight, gram in stacks)
        better_X = torch.as_tensor(error_X) < least_X
        least_X = torch.where(better_X, error_X, least_X)
        best_XI = torch.where(better_X.unsqueeze(1), scale_XI, best_XI)
    return best_XI


def _even(scale_XI: Tensor, pow2: bool) -> Tensor:
    """As much above one as below, so that nothing grows as a whole."""
    scale_XI = scale_XI / (scale_XI.amax(1, keepdim=True) * scale_XI.amin(1, keepdim=True)).sqrt()
    return scale_XI.log2().round().exp2() if pow2 else scale_XI


def _error(
    weight_BOI: Tensor, gram_BII: Tensor, scale_XI: Tensor, bits: int, group_size: int, stored: torch.dtype
) -> Tensor:
    """Mean squared change of what the matrices return, [X]: the sum over all of them where they share a scale."""
    scale_XOI = scale_XI.unsqueeze(1)
    codes, scale = rtn(weight_BOI.float() * scale_XOI, bits, group_size, stored, "max")
    off_BOI = dequantized(codes, scale.float()) / scale_XOI - weight_BOI.float()
    error_B = ((off_BOI @ gram_BII) * off_BOI).sum((1, 2))
    return error_B if len(scale_XI) == len(weight_BOI) else error_B.sum(0, keepdim=True)
