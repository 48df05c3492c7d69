"""One key of a GGUF file's metadata as the bytes that it is stored in: copied as they are, or with other numbers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# The format's own numbers of its types (gguf.GGUFValueType).
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """kind: the value's type, or that of an array's elements; count: of an array; raw: key, type and value.

    start: where in raw the value, or an array's first element, begins.
    """

    key: str
    kind: int
    count: int | None
    raw: bytes
    start: int

    @property
    def value(self) -> Any:
        """A number, a text, or a list of numbers; None for a list of texts."""
        if self.kind == STRING:
            return None if self.count is not None else self.raw[self.start + 8 :].decode(errors="replace")
        found = struct.unpack_from(
            f"<{1 if self.count is None else self.count}{NUMBERS[self.kind]}", self.raw, self.start
        )
        return found[0] if self.count is None else list(found)

    def with_value(self, value: Any) -> MetadataEntry:
        """The same key and type with another number, or other numbers. ValueError if they do not fit the type."""
        numbers: Sequence[Any] = [value] if self.count is None else value
        before = self.raw[: self.start]
        if self.count is not None:
            before = before[:-8] + struct.pack("<Q", len(numbers))
        try:
            raw = before + struct.pack(f"<{len(numbers)}{NUMBERS[self.kind]}", *numbers)
        except (KeyError, struct.error) as error:
            raise ValueError(f"{self.key} is of a type that cannot hold {value}.") from error
        return replace(self, count=None if self.count is None else len(numbers), raw=raw)


def number_entry(key: str, number: int) -> MetadataEntry:
    """A new key with a number of 32 bits."""
    name = key.encode()
    before = struct.pack("<Q", len(name)) + name + struct.pack("<I", 4)
    return MetadataEntry(key, 4, None, before + struct.pack("<I", number), len(before))
