"""Text files: documents between blank lines, found by one pass over the bytes and read when they are asked for.

A line ends where `str.splitlines` says so, and is blank where `str.strip` leaves nothing; both in UTF-8, as bytes.
"""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from moe_compress.data.files import BLOCK

# The first byte stands in a class of its own, which is what the search for it is fast by.
BREAK = rb"[\n\r\v\f\x1c-\x1e\xc2\xe2](?>(?<=\r)\n?|(?<=[\n\v\f\x1c-\x1e])|(?<=\xc2)\x85|(?<=\xe2)\x80[\xa8\xa9])"
WIDE = rb"(?>\xc2\xa0|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
SEPARATOR = re.compile(BREAK + rb"[ \t\x1f]*+(?:" + WIDE + rb"[ \t\x1f]*+)*+" + BREAK)
NARROW = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"
NOTHING = re.compile(rb"(?:[" + NARROW + rb"]++|\xc2\x85|\xe2\x80[\xa8\xa9]|" + WIDE + rb")*+")
LAST_BREAK = re.compile(BREAK + rb"\Z")
# Bytes of line ends and blanks: what a block may end with is looked at together with the next one, up to MAX_HELD.
HELD = (
    b" \t\n\r\v\f\x1c\x1d\x1e\x1f\xc2\x85\xa0\xe1\x9a\x80\xe2\x81\x82\x83\x84\x86\x87\x88\x89\x8a\xa8\xa9\xaf\x9f\xe3"
)
MAX_HELD = BLOCK
PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Spans:
    """Where documents begin and end in a file, in its order."""

    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, start: int, end: int) -> None:
        """One more document."""
        self.starts.append(start)
        self.ends.append(end)

    def __len__(self) -> int:
        return len(self.starts)


def paragraphs(path: Path, file: IO[bytes]) -> Spans:
    """Where the documents of a text file lie; those of blanks alone are left out. ValueError if it is not UTF-8."""
    found, decoder = Spans(), codecs.getincrementaldecoder("utf-8")()
    start, filled, offset, held = 0, False, 0, b""
    while True:
        block = file.read(BLOCK)
        _check(decoder, block, path, offset + len(held))
        buffer, at_end = held + block, not block
        kept = len(buffer) if at_end else len(buffer.rstrip(HELD))
        if len(buffer) - kept > MAX_HELD:
            kept = len(buffer)
        if at_end and (last := LAST_BREAK.search(buffer[-3:])):
            kept -= len(last[0])
        here = 0
        for separator in SEPARATOR.finditer(buffer, 0, kept):
            if filled or not _blank(buffer, here, separator.start()):
                found.add(start, offset + separator.start())
            here, filled = separator.end(), False
            start = offset + here
        filled = filled or not _blank(buffer, here, kept)
        if at_end:
            if filled:
                found.add(start, offset + kept)
            return found
        offset += kept
        held = buffer[kept:]


def _blank(buffer: bytes, start: int, end: int) -> bool:
    found = NOTHING.match(buffer, start, end)
    return found is not None and found.end() == end


def _check(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int) -> None:
    """Raise ValueError, with the place, for bytes that are not UTF-8."""
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise ValueError(
            f"{path} is not UTF-8 text: byte {place + 1} is 0x{error.object[error.start]:02x} ({error.reason})."
        ) from error


def pieces(file: IO[bytes], start: int, end: int) -> Iterator[str]:
    """A document's text in pieces, with `\\n` for every end of a line and nothing in blank lines.

    No piece but the last ends with a blank, so that none has to know what follows it.
    """
    decoder, text, position, first = codecs.getincrementaldecoder("utf-8")(), "", start, True
    while position < end:
        file.seek(position)
        block = file.read(min(PIECE, end - position))
        position += len(block)
        text += decoder.decode(block)
        whole = text if position >= end else text.rstrip()
        if whole:
            yield _lines(whole, first)
            text, first = text[len(whole) :], False


def _lines(text: str, begins_a_line: bool) -> str:
    *lines, last = f"{text}.".splitlines()  # the full stop keeps a last, empty line
    lines.append(last[:-1])
    first = lines[0] if not begins_a_line else None
    lines = [line if line.strip() else "" for line in lines]
    if first is not None:
        lines[0] = first
    return "\n".join(lines)
