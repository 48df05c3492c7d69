"""A weight that a file holds as several tensors, read as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of several tensors, which are read when they are asked for; `[...]` is its numbers.

    NAMES: how its tensors end, that which tells the dtype first; SIGN: the one by which it is known.
    """

    NAMES: ClassVar[tuple[str, ...]] = ()
    SIGN: ClassVar[str] = ""
    END: ClassVar[str] = ".weight"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers."""
        raise NotImplementedError

    def get_dtype(self) -> str:
        """As a safetensors slice says it."""
        return "F32"

    @classmethod
    def stem(cls, name: str) -> str:
        """What the names of its tensors begin with, from the name of the weight."""
        return name.removesuffix(cls.END)

    @property
    def _held(self) -> list[str]:
        return [each.name for each in fields(self) if not each.kw_only]

    def parts(self) -> dict[str, Any]:
        """What it is made of, by how the names end."""
        return dict(zip(self.NAMES, (getattr(self, name) for name in self._held), strict=True))

    def each(self, change: Callable[[Any], Any]) -> Self:
        """The same with something else in place of each part."""
        return replace(self, **{name: change(getattr(self, name)) for name in self._held})
