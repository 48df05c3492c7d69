"""Matrices of 2 to 8 bits a weight that stay packed in memory and are multiplied by torch's own kernels.

Shipped inside edited checkpoints, so it needs torch alone. O outputs, I inputs, G groups of inputs, W words, R rows.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .activation_rounding import ROUNDS, rounding_of
from .bit_packing import WORD, dequantized, pack, unpack
from .packed_kernels import KERNEL_STEP, Kernel, integers_multiply, kernel_lacks, kernel_of

PARAMETERS = ("words", "scales")
# Ends of the names of experts' matrices that multiply neither what experts are sent nor what they make of it.
INNER = (".left", "w_down.core", "w_down.basis")
# Outputs that are made dense together, where no kernel multiplies.
TILE = defaultdict(lambda: KERNEL_STEP, cuda=16 * KERNEL_STEP)


class PackedMatrix(nn.Module):
    """One matrix [O, I] of few bits, with its bias; a linear map that takes the place of another.

    On its first product with bf16 rows, the words go over into the layout of torch's int4 (or int8) kernel and are
    given up; where there is no such kernel (other activations, odd widths), every product makes the matrix dense.
    Where its rows are rounded to 8 bits, as its own codes are, both are multiplied as whole numbers.
    groups: of outputs that have rows of their own, [..., groups, I] (DeepSeek-V4); these are made dense as well.
    """

    def __init__(
        self, words_OW: Tensor, scale_OG: Tensor, bits: int, inputs: int, bias_O: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, inputs, words_OW.shape[0]
        self.words = nn.Parameter(words_OW, requires_grad=False)
        self.scales = nn.Parameter(scale_OG, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.kernel: Kernel | None = None
        self.groups = 1

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

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Signed codes int8 [O, I], or those of some outputs, from a multiple of KERNEL_STEP on."""
        stop = self.out_features if stop is None else stop
        if self.kernel is not None:
            return self.kernel.codes(start, stop)
        return unpack(self.words[start:stop], self.bits, self.in_features)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same as plain numbers, in the dtype of its scales."""
        return dequantized(self.codes(start, stop), self.scales.detach()[start:stop])

    def _by_tiles(self, x_RI: Tensor) -> Tensor:
        """The product with tiles of the matrix that are made dense in turn, so that it never is as a whole."""
        step, found = TILE[x_RI.device.type], []
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            found.append(linear(x_RI, self.dense(start, stop).to(x_RI.dtype), bias))
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _by_groups(self, x_RGI: Tensor) -> Tensor:
        """The product of every group of outputs with its own rows."""
        step = self.out_features // self.groups
        starts = range(0, self.out_features, step)
        dense = (self.dense(start, start + step).to(x_RGI.dtype) for start in starts)
        return torch.stack([linear(x_RGI[..., g, :], weight_OI) for g, weight_OI in enumerate(dense)], -2)

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        if self.groups > 1:
            return self._by_groups(x_RI)
        rows = x_RI.reshape(-1, self.in_features)
        if self.kernel is None and len(rows) and not rows.requires_grad:
            reason = self.prepare(rows.dtype, rows.device)
            if reason:
                warnings.warn(f"packed weights are made dense for every product: {reason}.", stacklevel=2)
        if self.kernel is None or not self.kernel.takes(rows):
            return self._by_tiles(x_RI)
        out_RO = self.kernel.multiply(rows).view(*x_RI.shape[:-1], self.out_features)
        return out_RO if self.bias is None else out_RO + self.bias

    def prepare(self, dtype: torch.dtype, device: torch.device) -> str:
        """Change over to the layout of the kernel for such rows; why there is none, or empty where there is."""
        if self.kernel is not None:
            return ""
        if self.groups > 1:
            return "no kernel multiplies groups of outputs with rows of their own"
        integers = bool(rounding_of(self)) and integers_multiply(self)
        reason = "" if integers else kernel_lacks(self, dtype, device.type)
        if reason:
            return reason
        self.kernel = kernel_of(self, integers)
        self.words = nn.Parameter(self.words.new_empty(0), requires_grad=False)
        return ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[f"{prefix}words"] = pack(self.codes(), self.bits)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.leave_kernel()  # layouts differ between devices: back to words, and over again there
        return super()._apply(fn, recurse)

    def leave_kernel(self) -> None:
        """Go back to the words, from which the next product takes the layout that it needs."""
        if self.kernel is not None:
            self.words = nn.Parameter(pack(self.codes(), self.bits), requires_grad=False)
            self.kernel = None


def expect_rounded(experts: nn.Module) -> None:
    """Tell packed matrices of experts whose rows come rounded, so that whole numbers can be multiplied.

    Those behind another factor, or behind a sum over experts, are given other numbers.
    """
    for name, module in experts.named_modules():
        if isinstance(module, PackedMatrix) and not name.endswith(INNER):
            module.leave_kernel()
            module.__dict__[ROUNDS] = "given"


def is_packed(model: nn.Module) -> bool:
    """Whether any matrix of a model is packed."""
    return any(isinstance(module, PackedMatrix) for module in model.modules())
