"""Matrices of 2 to 8 bits a weight that stay packed in memory and are multiplied by torch's own kernels.

A weight is code * scale, with signed codes and one scale for every `group` inputs of an output. Codes are stored as
compressed-tensors does (`pack-quantized`): offset by 2^(bits-1), 32 of them in `bits` words. Shipped inside edited
checkpoints, so it needs torch alone. O outputs, I inputs, G groups of inputs, W words, R rows.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

WORD = 32
# Up to so many rows the kernel of small products wins over making the matrix dense and multiplying.
KERNEL_ROWS = {"cpu": 32, "cuda": 64}
KERNEL_GROUPS = (256, 128, 64, 32)
INNER_TILES = 8
# Outputs that are converted together on a CPU: whole blocks of its layout, whatever the processor.
KERNEL_STEP = 512
PARAMETERS = ("words", "scales")


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
        raised = _parts_of_bytes(words.contiguous().view(torch.uint8), bits)[..., :inputs]
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


def _parts_of_bytes(octets: Tensor, bits: int) -> Tensor:
    """Bytes [..., N] cut into numbers of 2, 4 or 8 bits, low ones first: uint8 [..., N * 8 / bits]."""
    if bits == 8:
        return octets
    mask = (1 << bits) - 1
    return torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(-2)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights [..., O, I] of codes [..., O, I] and scales [..., O, G], in the dtype of the scales."""
    return (codes.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


class PackedMatrix(nn.Module):
    """One matrix [O, I] of few bits, with its bias; a linear map that takes the place of another.

    On its first product with bf16 rows, the words go over into the layout of torch's int4 (or int8) kernel and are
    given up; where there is no such kernel (other activations, odd widths), every product makes the matrix dense.
    """

    def __init__(
        self, words_OW: Tensor, scale_OG: Tensor, bits: int, inputs: int, bias_O: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, inputs, words_OW.shape[0]
        self.words = nn.Parameter(words_OW, requires_grad=False)
        self.scales = nn.Parameter(scale_OG, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.kernel: _Kernel | None = None

    @classmethod
    def of(cls, codes_OI: Tensor, scale_OG: Tensor, bits: int, bias_O: Tensor | None = None) -> PackedMatrix:
        """A matrix from its codes."""
        return cls(pack(codes_OI, bits), scale_OG, bits, codes_OI.shape[1], bias_O)

    @classmethod
    def empty(cls, like_OI: Tensor, bits: int, group: int, bias_O: Tensor | None = None) -> PackedMatrix:
        """Room for a matrix of this shape, on its device."""
        outputs, inputs = like_OI.shape
        words = torch.empty(outputs, math.ceil(inputs * bits / WORD), dtype=torch.int32, device=like_OI.device)
        return cls(words, like_OI.new_empty(outputs, inputs // group), bits, inputs, bias_O)

    @property
    def weight_like(self) -> Tensor:
        """A tensor without storage of the matrix's shape, for counting."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.scales.shape[1]

    def codes(self) -> Tensor:
        """Signed codes int8 [O, I]."""
        if self.kernel is not None:
            return self.kernel.codes()
        return unpack(self.words, self.bits, self.in_features)

    def dense(self) -> Tensor:
        """The matrix as plain numbers [O, I], in the dtype of its scales."""
        return dequantized(self.codes(), self.scales.detach())

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        rows = x_RI.reshape(-1, self.in_features)
        if self.kernel is None and len(rows) and not rows.requires_grad:
            reason = self.prepare(rows.dtype, rows.device)
            if reason:
                warnings.warn(f"packed weights are made dense for every product: {reason}.", stacklevel=2)
        if self.kernel is None or len(rows) > KERNEL_ROWS[rows.device.type] or rows.dtype != torch.bfloat16:
            return linear(x_RI, self.dense().to(x_RI.dtype), self.bias)
        out_RO = self.kernel.multiply(rows).view(*x_RI.shape[:-1], self.out_features)
        return out_RO if self.bias is None else out_RO + self.bias

    def prepare(self, dtype: torch.dtype, device: torch.device) -> str:
        """Change over to the layout of the kernel for such rows; why there is none, or empty where there is."""
        reason = kernel_lacks(self, dtype, device.type)
        if reason:
            return reason
        make = _Int8 if self.bits == 8 else _Int4
        self.kernel = make(self.words.detach(), self.scales.detach(), self.bits, self.in_features)
        self.words = nn.Parameter(self.words.new_empty(0), requires_grad=False)
        return ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[f"{prefix}words"] = pack(self.kernel.codes(), self.bits)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Layouts differ between devices: back to words, and over again there.
        if self.kernel is not None:
            self.words = nn.Parameter(pack(self.kernel.codes(), self.bits), requires_grad=False)
            self.kernel = None
        return super()._apply(fn, recurse)


def is_packed(model: nn.Module) -> bool:
    """Whether any matrix of a model is packed."""
    return any(isinstance(module, PackedMatrix) for module in model.modules())


def kernel_lacks(matrix: PackedMatrix, dtype: torch.dtype, device: str) -> str:
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
    if device == "cpu" and not _cpu_block():
        return "the layout of torch's int4 kernel on this processor is not known"
    step = 16 if device == "cpu" else 8
    if outputs % step or matrix.in_features % (WORD if device == "cpu" else 16 * INNER_TILES):
        return f"a matrix of {outputs} x {matrix.in_features} does not fit the 4-bit kernel"
    if _kernel_group(matrix.group) is None or matrix.in_features % (_kernel_group(matrix.group) or 1):
        return f"the 4-bit kernel takes groups of {', '.join(map(str, KERNEL_GROUPS))}, not of {matrix.group}"
    return ""


def _kernel_group(group: int) -> int | None:
    """The kernel's group that a group consists of."""
    return next((size for size in KERNEL_GROUPS if group % size == 0), None)


class _Kernel:
    """A matrix in the layout of one of torch's kernels."""

    def multiply(self, rows_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """The signed codes again."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """What it keeps in memory."""
        return [value for value in self.__dict__.values() if isinstance(value, Tensor)]


class _Int8(_Kernel):
    def __init__(self, words_OW: Tensor, scale_O1: Tensor, bits: int, inputs: int) -> None:
        self.codes_OI, self.scale_O = unpack(words_OW, bits, inputs), scale_O1[:, 0].bfloat16().contiguous()

    def multiply(self, rows_RI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows_RI.contiguous(), self.codes_OI, self.scale_O)

    def codes(self) -> Tensor:
        return self.codes_OI


class _Int4(_Kernel):
    """weight = (code + 8 - 8) * scale + 0; scales in bf16, as the kernel takes them."""

    def __init__(self, words_OW: Tensor, scale_OG: Tensor, bits: int, inputs: int) -> None:
        self.shape = torch.Size((len(words_OW), inputs))
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

    def codes(self) -> Tensor:
        if self.packed.is_cuda:
            return _from_cuda_kernel(self.packed, self.shape)
        return _from_cpu_kernel(self.packed, self.shape, _cpu_block())


def _to_kernel(codes_OI: Tensor) -> Tensor:
    raised_OI = codes_OI.to(torch.int32) + 8
    if not codes_OI.is_cuda:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised_OI, 1)
    pairs_OI = ((raised_OI[:, ::2] << 4) | raised_OI[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs_OI.contiguous(), INNER_TILES)


def _from_cpu_kernel(packed: Tensor, shape: torch.Size, block: int) -> Tensor:
    """Codes of the CPU kernel's layout: blocks of outputs, input by input, the first half of a block in the low bits;
    what is left of the outputs in pairs of neighbours.
    """
    outputs, inputs = shape
    flat, whole = packed.flatten(), outputs // block * block
    blocked = flat[: whole * inputs // 2].view(-1, inputs, block // 2)
    found = [torch.cat([blocked & 15, blocked >> 4], 2).transpose(1, 2).reshape(whole, inputs)]
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
    return _parts_of_bytes(packed.flatten(2).view(torch.uint8), 4)


@functools.cache
def _cuda_order(device: torch.device) -> Tensor:
    """Where each number of a tile lies, found by converting a tile that holds the digits of every place."""
    place = torch.arange(8 * 16 * INNER_TILES, device=device).view(8, -1)
    digits = [_nibbles(_to_kernel((place // 16**n % 16 - 8).to(torch.int8))).flatten().long() for n in range(3)]
    return sum(digit * 16**n for n, digit in enumerate(digits)).argsort()


@functools.cache
def _cpu_block() -> int:
    """How many outputs this processor's layout takes together, found by trying; 0 for a layout that is not known."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (144, 64), dtype=torch.int8, generator=generator)
    packed = _to_kernel(codes)
    if packed.dtype != torch.uint8 or packed.numel() != codes.numel() // 2:
        return 0
    for block in (64, 32, 16, 1 << 30):
        if torch.equal(_from_cpu_kernel(packed, codes.shape, block), codes):
            return block
    return 0
