"""A weight that a file holds as several tensors, read as one. O outputs, I inputs, G groups of inputs, W words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from moe_compress.models.modeling.bit_packing import dequantized, unpack

if TYPE_CHECKING:
    from moe_compress.checkpoints.formats.grid import Grid


def transposed(words: Tensor) -> Tensor:
    """Columns as rows, one behind the other in memory, which `contiguous` does not see to where there is one alone."""
    return words.T.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of several tensors, which are read when they are asked for; `[...]` is its numbers.

    Its fields are its tensors, in the order of NAMES and OPTIONAL; keyword-only fields are what config.json alone knows
    of it.

    NAMES: how the names of its tensors end, that which tells the dtype first; OPTIONAL: the same of tensors that it may
    have, None where it has not; SIGN: the one by which it is known; DTYPES: that SIGN's tensor has, in the words of
    safetensors, where relatives have the same names; END: how the name of the weight ends that they stand for.
    """

    NAMES: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    SIGN: ClassVar[str] = ""
    DTYPES: ClassVar[tuple[str, ...]] = ()
    END: ClassVar[str] = ".weight"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers."""
        raise NotImplementedError

    def get_dtype(self) -> str:
        """As a safetensors slice says it."""
        return "F32"

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids ("has scales ..."); empty if they fit, as far as is known."""
        return ""

    @property
    def stays_packed(self) -> bool:
        """Whether `moe_compress.load` keeps it packed in memory."""
        return False

    @classmethod
    def reads(cls, dtypes: Mapping[str, str]) -> bool:
        """Whether tensors of these dtypes, by how their names end, are such a weight; SIGN's is one of them."""
        return not cls.DTYPES or dtypes[cls.SIGN] in cls.DTYPES

    @classmethod
    def stem(cls, name: str) -> str:
        """What the names of its tensors begin with, from the name of the weight."""
        return name.removesuffix(cls.END)

    @property
    def _held(self) -> list[str]:
        return [each.name for each in fields(self) if not each.kw_only]

    def parts(self) -> dict[str, Any]:
        """What it is made of, by how the names end."""
        held = zip((*self.NAMES, *self.OPTIONAL), (getattr(self, name) for name in self._held), strict=True)
        return {end: part for end, part in held if part is not None}

    def each(self, change: Callable[[Any], Any]) -> Self:
        """The same with something else in place of each part."""
        held = {name: getattr(self, name) for name in self._held}
        return replace(self, **{name: change(part) for name, part in held.items() if part is not None})


@dataclass(frozen=True, slots=True)
class PackedWeight(StoredWeight):
    """One matrix of whole codes and scales: with `moe_compress.load`, it stays packed in memory.

    Its numbers come in the scales' dtype. bits: of a code, where config.json says one width for all.
    """

    bits: int | None = field(default=None, kw_only=True)

    @property
    def stays_packed(self) -> bool:
        """It does, unless a layout says otherwise of some."""
        return True

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """Words int32 [O, W], packed along the inputs, scales [O, G], bits and inputs."""
        raise NotImplementedError

    def codes(self) -> tuple[Tensor, Tensor, int]:
        """Signed codes int8 [O, I], scales [O, G] and bits."""
        words_OW, scale_OG, bits, inputs = self.packed()
        return unpack(words_OW, bits, inputs), scale_OG, bits

    def __getitem__(self, _everything: Any) -> Tensor:
        """The weights [O, I]."""
        codes_OI, scale_OG, _ = self.codes()
        return dequantized(codes_OI, scale_OG)


@dataclass(frozen=True, slots=True)
class StackedWeight(StoredWeight):
    """The matrices of all experts of a layer in one stack, experts first."""

    def experts(self, chosen: Sequence[int]) -> Self:
        """The same of some experts, as they are."""
        return self.each(lambda part: part[...][list(chosen)])
