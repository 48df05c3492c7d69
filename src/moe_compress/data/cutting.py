"""Documents cut into windows of S tokens: joined and cut at every S tokens, or one document a window, padded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_compress.data.encoding import Encoded, Encoder
from moe_compress.data.local import Text


@dataclass(frozen=True, slots=True)
class Window:
    """One window: padding is False in mask_S; counted_S: the tokens that count; document_S: where each is from."""

    ids_S: Tensor
    mask_S: Tensor
    counted_S: Tensor
    document_S: Tensor


@dataclass
class Draw:
    """Documents as they are drawn from one source after the other; what an earlier one gave is left out, and counted.

    number: of the next document.
    """

    encoder: Encoder
    number: int = 0
    repeated: int = 0
    digests: set[str] = field(default_factory=set)
    _earlier: frozenset[str] = frozenset()

    def next_source(self) -> None:
        """What was drawn until now is not drawn again."""
        self._earlier = frozenset(self.digests)

    def encode(self, document: Text, most: int) -> Encoded | None:
        """At most `most` tokens of a document; None if it has none, or was drawn from an earlier source."""
        encoded = self.encoder.encode(document, most)
        if encoded.digest in self._earlier:
            self.repeated += 1
            return None
        if not len(encoded.ids_S):
            return None
        self.digests.add(encoded.digest)
        return encoded


def pack(documents: Iterable[Text], draw: Draw, length: int, count: int, longest: int | None) -> list[Window]:
    """Windows cut out of documents joined, of no more than `longest` tokens each."""
    windows: list[Window] = []
    ids, counted, numbers = (torch.empty(0, dtype=kind) for kind in (torch.long, torch.bool, torch.long))
    rest = iter(documents)
    while len(windows) < count and (document := next(rest, None)) is not None:
        missing = (count - len(windows)) * length - len(ids)
        encoded = draw.encode(document, min(missing, longest or missing))
        if encoded is None:
            continue
        ids = torch.cat([ids, encoded.ids_S])
        counted = torch.cat([counted, _counted(encoded)])
        numbers = torch.cat([numbers, torch.full((len(encoded.ids_S),), draw.number)])
        draw.number += 1
        whole = len(ids) // length * length
        mask_S = torch.ones(length, dtype=torch.bool)
        for start in range(0, whole, length):
            cut = slice(start, start + length)
            windows.append(Window(ids[cut], mask_S, counted[cut], numbers[cut]))
        ids, counted, numbers = ids[whole:], counted[whole:], numbers[whole:]
    return windows


def pad(
    documents: Iterable[Text], draw: Draw, length: int, count: int, longest: int | None, filler: int
) -> list[Window]:
    """A document a window: cut at its end, or filled up to it."""
    windows: list[Window] = []
    rest = iter(documents)
    while len(windows) < count and (document := next(rest, None)) is not None:
        encoded = draw.encode(document, min(length, longest or length))
        if encoded is None:
            continue
        blank = length - len(encoded.ids_S)
        windows.append(
            Window(
                torch.cat([encoded.ids_S, torch.full((blank,), filler)]),
                torch.arange(length) < len(encoded.ids_S),
                torch.cat([_counted(encoded), torch.zeros(blank, dtype=torch.bool)]),
                torch.full((length,), draw.number),
            )
        )
        draw.number += 1
    return windows


def _counted(encoded: Encoded) -> Tensor:
    return torch.ones_like(encoded.ids_S, dtype=torch.bool) if encoded.counted_S is None else encoded.counted_S
