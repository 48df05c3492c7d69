"""Files of rows: one JSON value a line, found by one pass and read when they are asked for.

JSON arrays, CSV and Parquet are written anew in that form into a nameless file, row by row, so that a file may be
larger than the memory. Bytes that are not UTF-8 pass as lone surrogates, and are named where a document holds them.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from moe_compress.data.files import BLOCK, spooled
from moe_compress.utils.files import room_for

MAX_ROW = 1 << 26
BETWEEN = re.compile(r"[ \t\n\r,]*")


def as_lines(path: Path, file: IO[bytes], kind: str) -> IO[bytes]:
    """A file of rows with a JSON value a line. ValueError, with the row, for what cannot be read."""
    convert = CONVERSIONS.get(kind)
    if convert is None or (kind == "json" and not _holds_array(file)):
        return file
    lines = spooled()
    for row in convert(path, file):
        with room_for(Path(tempfile.gettempdir())):
            lines.write(json.dumps(row, default=_plain).encode() + b"\n")
    lines.seek(0)
    return lines


def _plain(value: Any) -> Any:
    """What JSON has no word for, as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def rows(path: Path, file: IO[bytes]) -> Iterator[tuple[int, int, int, Any]]:
    """(number from 1, where its line begins and ends, value) of every row; blank lines are no rows."""
    file.seek(0)
    position, number = 0, 0
    while line := file.readline(MAX_ROW + 1):
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            number += 1
            yield number, position, position + len(line), row_of(path, line, number)
        position += len(line)


def row_of(path: Path, line: bytes, number: int) -> Any:
    """The value of a line. ValueError, with its row, if it holds none."""
    if len(line) > MAX_ROW:
        raise ValueError(
            f"row {number} of {path} has more than {MAX_ROW >> 20} MiB: a longer document can be read from a .txt file."
        )
    try:
        return json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as json: row {number} is not valid ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return "it nests too deeply" if isinstance(error, RecursionError) else str(error)


def _holds_array(file: IO[bytes]) -> bool:
    """Whether a .json file is one array, and not a row a line."""
    begin = file.read(BLOCK).lstrip(b" \t\r\n\xef\xbb\xbf")
    file.seek(0)
    if not begin.startswith(b"["):
        return False
    # A row a line may be a list, too: its line is whole.
    first, _, rest = begin.partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _array(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The values of a JSON array, one after the other. ValueError for a broken one, with the row."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder, number = json.JSONDecoder(), 1
    try:
        buffer = text.read(BLOCK)
        at = _behind(BETWEEN, buffer, buffer.index("[") + 1)
        while not buffer.startswith("]", at):
            try:
                value, end = decoder.raw_decode(buffer, at)
                whole = end < len(buffer)  # else a number may go on in what follows
            except json.JSONDecodeError as error:
                whole = False
                if len(buffer) - at > MAX_ROW:
                    raise ValueError(f"{error}, or it has more than {MAX_ROW >> 20} MiB") from error
            if whole:
                yield value
                number, at = number + 1, _behind(BETWEEN, buffer, end)
                continue
            # As much again every time: a long value is tried a few times only.
            more = text.read(max(BLOCK, len(buffer) - at))
            if not more:
                raise ValueError("the file ends within it")
            buffer = buffer[at:] + more
            at = _behind(BETWEEN, buffer, 0)
        if (buffer[at + 1 :] + text.read(BLOCK)).strip():
            raise ValueError("something follows the array")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as json: row {number} is not valid ({_reason(error)}).") from error
    finally:
        text.detach()


def _behind(what: re.Pattern[str], text: str, start: int) -> int:
    found = what.match(text, start)
    return found.end() if found else start


def _csv(path: Path, file: IO[bytes]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file whose first line names the fields."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit, number = csv.field_size_limit(MAX_ROW), 1
    try:
        found = csv.DictReader(text, restkey="", restval="", strict=True)
        _require_different(found.fieldnames or ())
        for row in found:
            if "" in row:
                raise ValueError("it has more values than the first line has names")
            yield row
            number += 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as csv: row {number} is not valid ({error}).") from error
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _require_different(names: Sequence[str]) -> None:
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")


def _parquet(path: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a few at a time."""
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _require_different(table.schema_arrow.names)
        # No text is a time, and many a time is none that Python has.
        names = [field.name for field in table.schema_arrow if not pyarrow.types.is_temporal(field.type)]
        for batch in table.iter_batches(batch_size=64, columns=names):
            columns = [_bytes(column) for column in batch.columns]
            yield from pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    except (pyarrow.ArrowException, OSError, ArithmeticError, LookupError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _bytes(column: Any) -> Any:
    """A column of text as the bytes that it holds, which need not be UTF-8."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


CONVERSIONS: dict[str, Callable[[Path, IO[bytes]], Iterator[Any]]] = {"json": _array, "csv": _csv, "parquet": _parquet}
