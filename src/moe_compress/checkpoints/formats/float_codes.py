"""Numbers of few bits as files hold them: E2M1 in half bytes, powers of two in bytes, a scale for a part of a matrix.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Numbers of 4 bits with 2 of exponent, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127


def e2m1_numbers(octets: Tensor) -> Tensor:
    """The numbers of two codes a byte, the first in the low bits: [..., I / 2] -> fp32 [..., I]."""
    value = torch.tensor([*E2M1, *(-number for number in E2M1)], device=octets.device)
    return torch.stack([value[(octets & 15).int()], value[(octets >> 4).int()]], -1).flatten(-2)


def e2m1_octets(number: Tensor) -> Tensor:
    """The same backwards, for numbers that are all on the grid: [..., I] -> uint8 [..., I / 2]."""
    value = torch.tensor(E2M1, device=number.device)
    code = (
        torch.searchsorted(value, number.float().abs().contiguous()).to(torch.uint8) | (number < 0).to(torch.uint8) << 3
    )
    return (code[..., ::2] | code[..., 1::2] << 4).contiguous()


def powers_of_two(exponent: Tensor) -> Tensor:
    """Scales of one byte each, E8M0, in fp32."""
    return torch.exp2(exponent.float() - E8M0_BIAS)


def exponents(scale: Tensor) -> Tensor:
    """The same backwards, for powers of two: uint8."""
    return (torch.frexp(scale.float()).exponent - 1 + E8M0_BIAS).to(torch.uint8)


def spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None = None) -> Tensor:
    """A scale of a matrix [O, I], its rows, groups of inputs or blocks, so that it goes with every number.

    block: outputs and inputs of a block; those at the edges are cut off. ValueError for a scale of another shape.
    """
    outputs, inputs = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() > 2:  # dimensions of one number between those of blocks
        scale = scale.flatten(1)
    blocks = [math.ceil(length / size) for length, size in zip((outputs, inputs), block or (1, 1), strict=True)]
    if block is not None and list(scale.shape) == blocks:
        for dim, (size, length) in enumerate(zip(block, (outputs, inputs), strict=True)):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, length)
        return scale
    if scale.shape[0] == outputs and scale.numel() == outputs:
        return scale.reshape(outputs, 1)
    if scale.dim() != 2 or scale.shape[0] != outputs or inputs % scale.shape[1]:
        raise ValueError(f"a scale of the shape {tuple(scale.shape)} fits no matrix of {outputs} x {inputs}.")
    return scale.repeat_interleave(inputs // scale.shape[1], 1)
