"""Codes of 2 to 8 bits in words of 32: how packed weights lie in memory and in files.

A weight is code * scale, with signed codes and one scale for every `group` inputs of an output. Codes are stored as
compressed-tensors does (`pack-quantized`): offset by 2^(bits-1), 32 of them in `bits` words. Shipped inside edited
checkpoints, so it needs torch alone. O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [..., I] -> int32 words [..., ceil(I * bits / 32)]."""
    inputs = codes.shape[-1]
    raised = torch.nn.functional.pad(codes.to(torch.int32) + (1 << (bits - 1)), (0, -inputs % WORD))
    raised = raised.unflatten(-1, (-1, WORD))
    words = raised.new_zeros(*raised.shape[:-1], bits)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        words[..., word] |= raised[..., i] << shift
        if shift + bits > WORD:  # the rest of the code begins the next word
            words[..., word + 1] |= raised[..., i] >> (WORD - shift)
    return words.flatten(-2)[..., : math.ceil(inputs * bits / WORD)].contiguous()


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The same backwards: int8 [..., I]."""
    if bits != 3:  # codes that never part are taken out of bytes, all at once
        raised = parts_of_bytes(words.contiguous().view(torch.uint8), bits)[..., :inputs]
        return (
            (raised ^ (1 << (bits - 1))).view(torch.int8) if bits == 8 else raised.view(torch.int8) - (1 << (bits - 1))
        )
    whole = math.ceil(inputs / WORD) * bits
    words = torch.nn.functional.pad(words, (0, whole - words.shape[-1])).unflatten(-1, (-1, bits))
    codes = torch.empty(*words.shape[:-1], WORD, dtype=torch.int8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = words[..., word] >> shift
        if shift:  # the shift of a negative word drags ones along
            code = code & ((1 << (WORD - shift)) - 1)
        if shift + bits > WORD:
            code = code | (words[..., word + 1] << (WORD - shift))
        codes[..., i] = (code & mask) - (1 << (bits - 1))
    return codes.flatten(-2)[..., :inputs]


def parts_of_bytes(octets: Tensor, bits: int) -> Tensor:
    """Bytes [..., N] cut into numbers of 2, 4 or 8 bits, low ones first: uint8 [..., N * 8 / bits]."""
    if bits == 8:
        return octets
    mask = (1 << bits) - 1
    return torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(-2)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights [..., O, I] of codes [..., O, I] and scales [..., O, G], in the dtype of the scales."""
    return (codes.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)
