"""torch's own kernels for matrices of few bits, and the layouts that they take.

Shipped inside edited checkpoints, so it needs torch alone. O outputs, I inputs, G groups of inputs, W words, R rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .activation_rounding import integer_product
from .bit_packing import WORD, parts_of_bytes, unpack

# Up to so many rows the kernel of small products wins over making the matrix dense and multiplying.
KERNEL_ROWS = {"cpu": 32, "cuda": 64}
KERNEL_GROUPS = (256, 128, 64, 32)
INNER_TILES = 8
# Outputs that are converted together on a CPU: whole blocks of its layout, whatever the processor.
KERNEL_STEP = 512


def kernel_lacks(matrix: Any, dtype: torch.dtype, device: str) -> str:
    """Why no kernel multiplies this matrix with such rows; empty where one does."""
    outputs = matrix.out_features
    if device not in KERNEL_ROWS:
        return f"torch has no kernel for them on {device}"
    if dtype != torch.bfloat16:
        return f"the kernels take bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    if matrix.bits == 8 and device == "cuda":
        return "torch's 8-bit kernel is slower than that on cuda"
    if matrix.bits == 8 and matrix.in_features % WORD:
        return f"a matrix with {matrix.in_features} inputs does not fit the 8-bit kernel"
    if matrix.bits == 8:
        return "" if matrix.scales.shape[1] == 1 else "the 8-bit kernel takes one scale a row (group_size=0)"
    if device == "cpu" and not _cpu_layout()[0]:
        return "the layout of torch's int4 kernel on this processor is not known"
    step = 16 if device == "cpu" else 8
    if outputs % step or matrix.in_features % (WORD if device == "cpu" else 16 * INNER_TILES):
        return f"a matrix of {outputs} x {matrix.in_features} does not fit the 4-bit kernel"
    if _kernel_group(matrix.group) is None or matrix.in_features % (_kernel_group(matrix.group) or 1):
        return f"the 4-bit kernel takes groups of {', '.join(map(str, KERNEL_GROUPS))}, not of {matrix.group}"
    return ""


def integers_multiply(matrix: Any) -> bool:
    """Whether a product of whole numbers is there for this matrix."""
    fits = not matrix.words.is_cuda or (matrix.in_features % 8 == 0 and matrix.out_features % 8 == 0)
    return matrix.bits == 8 and matrix.scales.shape[1] == 1 and fits


def kernel_of(matrix: Any, integers: bool) -> Kernel:
    """A matrix in the layout of its kernel; integers: of whole numbers on both sides."""
    make: Any = (_Int8Rows if integers else _Int8) if matrix.bits == 8 else _Int4
    kernel: Kernel = make(matrix.words.detach(), matrix.scales.detach(), matrix.bits, matrix.in_features)
    return kernel


def _kernel_group(group: int) -> int | None:
    """The kernel's group that a group consists of."""
    return next((size for size in KERNEL_GROUPS if group % size == 0), None)


class Kernel:
    """A matrix in the layout of one of torch's kernels."""

    def takes(self, rows_RI: Tensor) -> bool:
        """Whether it is the fastest way for these rows, and multiplies them at all."""
        return len(rows_RI) <= KERNEL_ROWS[rows_RI.device.type] and rows_RI.dtype == torch.bfloat16

    def multiply(self, rows_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        raise NotImplementedError

    def codes(self, start: int, stop: int) -> Tensor:
        """The signed codes again, of these outputs; `start` is a multiple of KERNEL_STEP."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """What it keeps in memory."""
        return [value for value in self.__dict__.values() if isinstance(value, Tensor)]


class _Int8(Kernel):
    def __init__(self, words_OW: Tensor, scale_O1: Tensor, bits: int, inputs: int) -> None:
        self.codes_OI, self.scale_O = unpack(words_OW, bits, inputs).contiguous(), scale_O1[:, 0].contiguous()

    def multiply(self, rows_RI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows_RI.contiguous(), self.codes_OI, self.scale_O.bfloat16())

    def codes(self, start: int, stop: int) -> Tensor:
        return self.codes_OI[start:stop]


class _Int8Rows(_Int8):
    """For rows that are rounded to 8 bits as well: any number of them, of any dtype."""

    def takes(self, rows_RI: Tensor) -> bool:
        return len(rows_RI) > 0

    def multiply(self, rows_RI: Tensor) -> Tensor:
        return integer_product(rows_RI, self.codes_OI, self.scale_O)


class _Int4(Kernel):
    """weight = (code + 8 - 8) * scale + 0; scales in bf16, as the kernel takes them."""

    def __init__(self, words_OW: Tensor, scale_OG: Tensor, bits: int, inputs: int) -> None:
        self.inputs = inputs
        self.group = _kernel_group(inputs // scale_OG.shape[1]) or 0
        scale_OG = scale_OG.repeat_interleave(inputs // self.group // scale_OG.shape[1], 1)
        scale_GO = scale_OG.T.bfloat16()
        self.scales_GO2 = torch.stack([scale_GO, torch.zeros_like(scale_GO)], 2).contiguous()
        # Rows go over a few at a time: whole matrices of 32-bit codes would take eight times the packed one.
        rows = len(words_OW) if words_OW.is_cuda else KERNEL_STEP
        parts = [_to_kernel(unpack(part, bits, inputs)) for part in words_OW.split(rows)]
        self.packed = parts[0] if len(parts) == 1 else torch.cat(parts)

    def multiply(self, rows_RI: Tensor) -> Tensor:
        aten = torch.ops.aten
        multiply = aten._weight_int4pack_mm if rows_RI.is_cuda else aten._weight_int4pack_mm_for_cpu
        return multiply(rows_RI.contiguous(), self.packed, self.group, self.scales_GO2)

    def codes(self, start: int, stop: int) -> Tensor:
        shape = torch.Size((stop - start, self.inputs))
        if self.packed.is_cuda:
            return _from_cuda_kernel(self.packed[start // 8 : stop // 8], shape)
        part = self.packed.flatten()[start * self.inputs // 2 : stop * self.inputs // 2]
        return _from_cpu_kernel(part, shape, *_cpu_layout())


def _to_kernel(codes_OI: Tensor) -> Tensor:
    raised_OI = codes_OI.to(torch.int32) + 8
    if not codes_OI.is_cuda:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised_OI, 1)
    pairs_OI = ((raised_OI[:, ::2] << 4) | raised_OI[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs_OI.contiguous(), INNER_TILES)


def _from_cpu_kernel(packed: Tensor, shape: torch.Size, block: int, pairs: bool) -> Tensor:
    """Codes of the CPU kernel's layout: blocks of outputs, input by input, the first half of a block in the low bits;
    what is left of the outputs, and without vector instructions every block, in pairs of neighbours.
    """
    outputs, inputs = shape
    flat, whole = packed.flatten(), outputs // block * block
    blocked = flat[: whole * inputs // 2].view(-1, inputs, block // 2)
    halves = [blocked & 15, blocked >> 4]
    joined = torch.stack(halves, 3).flatten(2) if pairs else torch.cat(halves, 2)
    found = [joined.transpose(1, 2).reshape(whole, inputs)]
    if whole < outputs:
        rest = flat[whole * inputs // 2 :].view(inputs, -1)
        found.append(torch.stack([rest & 15, rest >> 4], 2).flatten(1).T)
    return torch.cat(found).to(torch.int8) - 8


def _from_cuda_kernel(packed: Tensor, shape: torch.Size) -> Tensor:
    """Codes of the CUDA kernel's layout: tiles of 8 outputs and 128 inputs, each in the order of the tensor cores."""
    nibbles = _nibbles(packed).index_select(2, _cuda_order(packed.device))
    return nibbles.unflatten(-1, (8, -1)).transpose(1, 2).reshape(shape).view(torch.int8) - 8


def _nibbles(packed: Tensor) -> Tensor:
    """The 1,024 numbers of every tile as they lie in memory, uint8."""
    return parts_of_bytes(packed.flatten(2).view(torch.uint8), 4)


@functools.cache
def _cuda_order(device: torch.device) -> Tensor:
    """Where each number of a tile lies, found by converting a tile that holds the digits of every place."""
    place = torch.arange(8 * 16 * INNER_TILES, device=device).view(8, -1)
    digits = [_nibbles(_to_kernel((place // 16**n % 16 - 8).to(torch.int8))).flatten().long() for n in range(3)]
    return sum(digit * 16**n for n, digit in enumerate(digits)).argsort()


@functools.cache
def _cpu_layout() -> tuple[int, bool]:
    """How many outputs this processor's layout takes together, and whether in pairs of neighbours: found out by trying.

    (0, False) for a layout that is not known.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (144, 64), dtype=torch.int8, generator=generator)
    packed = _to_kernel(codes)
    if packed.dtype == torch.uint8 and packed.numel() == codes.numel() // 2:
        for block, pairs in ((64, False), (32, False), (16, False), (64, True), (32, True), (16, True)):
            if torch.equal(_from_cpu_kernel(packed, codes.shape, block, pairs), codes):
                return block, pairs
    return 0, False
