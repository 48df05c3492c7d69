"""What one projection of a layer becomes: factors whose products stand for the experts' matrices.

E experts, O outputs, I inputs, k (or r) a rank, n bases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

Structure = Literal["svd", "base_delta", "shared_basis", "basis_mixture", "wrapper", "sparse_low_rank"]
Activation = Literal["linear", "silu", "tanh"]
STRUCTURES: tuple[str, ...] = get_args(Structure)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda mixed: mixed,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Grams(Protocol):
    """Second moments [I, I] of what each expert multiplies, one read at a time; a tensor [E, I, I] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, e: int, /) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Matrices [O, I] of E experts: core + left_e (right_e, the shared basis or a mixture of bases) + residue_e.

    left: [O, r_e] of each expert, empty where `basis` [O, k] stands in its place; right: [r_e, I] of each, empty where
    `basis` [k, I] or `bases` [n, k, I] with mix [E, n] are shared; core: [O, I]; activation: of the mixed bases;
    residue: [O, I] of each, with equally many numbers other than zero in every row.
    """

    left: list[Tensor]
    right: list[Tensor]
    core: Tensor | None = None
    basis: Tensor | None = None
    bases: Tensor | None = None
    mix: Tensor | None = None
    activation: str = "linear"
    residue: list[Tensor] = field(default_factory=list)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.left) or len(self.right)

    def expert(self, e: int) -> Tensor:
        """What stands for the matrix of one expert, [O, I]."""
        matrix_OI = self._left(e) @ self._right(e)
        if self.core is not None:
            matrix_OI = matrix_OI + self.core
        return matrix_OI + self.residue[e] if self.residue else matrix_OI

    def dense(self) -> Tensor:
        """What stands for all of them, [E, O, I]."""
        return torch.stack([self.expert(e) for e in range(self.experts)])

    @property
    def parameters(self) -> int:
        """Numbers that are stored: of a residue those in the places that it keeps."""
        shared = [part for part in (self.core, self.basis, self.bases, self.mix) if part is not None]
        dense = sum(part.numel() for part in (*self.left, *self.right, *shared))
        return dense + sum(len(part) * int((part != 0).sum(1).max()) for part in self.residue)

    def _left(self, e: int) -> Tensor:
        if self.left:
            return self.left[e]
        assert self.basis is not None, "no left side"
        return self.basis

    def _right(self, e: int) -> Tensor:
        if self.right:
            return self.right[e]
        if self.basis is not None:
            return self.basis
        assert self.bases is not None and self.mix is not None, "no right side"
        return ACTIVATIONS[self.activation](torch.einsum("n,nki->ki", self.mix[e], self.bases))
