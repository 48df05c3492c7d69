"""Documents of a file on this machine: found by one pass, read again one by one, in the order of a seed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_compress.data import paragraphs, tables
from moe_compress.data.files import kind_of, opened
from moe_compress.data.paragraphs import Spans
from moe_compress.data.rows import Conversation, Shape, document_of
from moe_compress.utils.choices import one_of
from moe_compress.utils.logging import log
from moe_compress.zoo.text import Document

SHORT = 1 << 20  # bytes of a document that is held whole


@dataclass(frozen=True, slots=True)
class LongText:
    """A document that is read in pieces, and no further than it is needed."""

    file: IO[bytes]
    start: int
    end: int
    domain: str
    source: str

    def pieces(self) -> Iterator[str]:
        """Its text."""
        return paragraphs.pieces(self.file, self.start, self.end)


Text = Document | LongText | Conversation


def pieces(text: Document | LongText) -> Iterator[str]:
    """A text in pieces, from its beginning."""
    return text.pieces() if isinstance(text, LongText) else iter((text.text,))


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of one source in an order of their own, read when they are asked for.

    read: those of a domain, or of all (None). No domain: there is no document.
    """

    domains: tuple[str, ...]
    read: Callable[[str | None], Iterator[Text]]

    def __iter__(self) -> Iterator[Text]:
        return self.read(None)

    def of(self, domain: str) -> Iterator[Text]:
        """Those of one domain."""
        return self.read(domain)


def in_order(
    domains: Sequence[str], domain_of_place: Sequence[int], read: Callable[[int], Text], seed: int
) -> Documents:
    """Documents by their places, in the order of the seed; each place has a number in `domains`."""
    order = seed_order(len(domain_of_place), seed)
    number = np.asarray(domain_of_place, dtype=np.int64)[order]

    def some(domain: str | None) -> Iterator[Text]:
        places = order if domain is None else order[number == domains.index(domain)]
        return (read(int(place)) for place in places)

    return Documents(tuple(domains), some)


def seed_order(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Places in an order that depends on the seed and on each place, on no library's random numbers."""
    keys = (hashlib.sha256(f"{seed}:{place}".encode()).digest()[:8] for place in range(count))
    return np.argsort(np.fromiter((int.from_bytes(key) for key in keys), np.uint64, count), kind="stable")


def local_documents(path: Path, shape: Shape, seed: int) -> Documents:
    """The documents of a file in the order of the seed. ValueError, with row and field, for what cannot be read."""
    known = kind_of(path)
    assert known is not None
    file = opened(path)
    if known[0] == "text":
        return _text(path, file, seed)
    return _rows(path, tables.as_lines(path, file, known[0]), shape, seed)


def _text(path: Path, file: IO[bytes], seed: int) -> Documents:
    spans = paragraphs.paragraphs(path, file)

    def read(place: int) -> Text:
        where = file, spans.starts[place], spans.ends[place]
        if where[2] - where[1] > SHORT:
            return LongText(*where, "text", path.name)
        return Document("".join(paragraphs.pieces(*where)), "text", path.name)

    return in_order(("text",) * bool(spans), array("i", bytes(4 * len(spans))), read, seed)


def _rows(path: Path, file: IO[bytes], shape: Shape, seed: int) -> Documents:
    """Every row is looked at once, so that a wrong one is named before anything has run."""
    spans, numbers, domains, found = Spans(), array("q"), dict[str, int](), array("i")
    unknown: tuple[int, Any] | None = None
    for number, start, end, row in tables.rows(path, file):
        try:
            document = document_of(row, shape, f"row {number} of {path}", path.name)
        except KeyError:
            unknown = unknown or (number, row)
            continue
        if document is not None:
            spans.add(start, end)
            numbers.append(number)
            found.append(domains.setdefault(document.domain, len(domains)))
    if unknown is not None:
        _say_unknown(path, shape, *unknown, rest=len(spans))

    def read(place: int) -> Text:
        file.seek(spans.starts[place])
        row = tables.row_of(path, file.read(spans.ends[place] - spans.starts[place]), numbers[place])
        document = document_of(row, shape, f"row {numbers[place]} of {path}", path.name)
        assert document is not None
        return document

    return in_order(tuple(domains), found, read, seed)


def _say_unknown(path: Path, shape: Shape, number: int, row: dict[str, Any], rest: int) -> None:
    """Raise ValueError if no row has a field that is known; warn if only some have none."""
    if rest:
        log.warning("%s: rows without a known field are left out, such as row %d.", path, number)
        return
    try:
        one_of(shape.text, row, f"field of {path.name}")
    except ValueError as error:
        raise ValueError(f"{error} Name the one that holds the text, or by fields= what is what.") from None
