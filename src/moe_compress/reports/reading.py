"""Reading records back: what is sound, what is skipped and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from moe_compress.reports.record import VERSION, Failure, Metric, Record, digest_of
from moe_compress.utils.files import read_json

# --- reading ------------------------------------------------------------------------------------------------------


class ValidMetric(Metric):
    """A metric that can be shown: numbers, ends in their order."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.interval or (self.value, self.value)
        if math.isnan(self.value) or not low <= high:
            raise ValueError("is no number, or its interval ends before it begins")
        return self


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Text(_Part):
    source: str
    tokens: int
    windows: int
    length: int


class _Protocol(_Part):
    id: str
    text: _Text
    dtype: str
    device: str


class _Base(_Part):
    fingerprint: str


class _Stage(_Part):
    method: str
    given: dict[str, Any]
    parameters: dict[str, Any]


class _Reported(_Part):
    calibration: dict[str, Any] | None = None


class _Cost(_Part):
    calibration_seconds: float
    surgery_seconds: float
    peak_bytes: float


class _Sizes(_Part):
    parameters: FiniteFloat
    bytes: FiniteFloat


class _Readable(_Part):
    """What no table can do without; the schema leaves it to the harness what else stands beside it."""

    base: _Base
    protocol: _Protocol
    recipe: list[_Stage]
    metrics: dict[str, ValidMetric]
    sizes: _Sizes
    cost: _Cost | None
    report: list[_Reported]


Kind = TypeVar("Kind", Record, Failure)
# Files, or folders of them.
Places = str | Path | Sequence[str | Path]


def load_records(paths: Iterable[Path]) -> list[Record]:
    """Read records. ValueError names the first file that is none, or was changed since."""
    records, problems = read_records(paths)
    if problems:
        raise ValueError(problems[0])
    return records


def read_records(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """The records among these files, and a sentence for each file that is none or was changed since."""
    return _read(paths, Record, "record")


def read_failures(paths: Iterable[Path]) -> tuple[list[Failure], list[str]]:
    """The failures among these files, and a sentence for each file that is none."""
    return _read(paths, Failure, "failure")


def _several(places: Places) -> Sequence[str | Path]:
    return [places] if isinstance(places, str | Path) else places


def sibling_folders(records: Places) -> list[Path]:
    """The folders that hold the folders of records, or of the record files."""
    found = [place.parent if place.is_dir() else place.parent.parent for place in map(Path, _several(records))]
    return list(dict.fromkeys(found))


def failures_of(records: Places) -> tuple[list[Failure], list[str]]:
    """Failures in the folders beside those of the records, and a sentence for each file there that is none."""
    return read_failures(path for place in sibling_folders(records) for path in sorted(place.glob("failures/*.json")))


def gather(places: Places) -> tuple[list[Record], list[str]]:
    """Records of files and of folders of them, and what `read_records` says of the others.

    ValueError for a place that is not there, or where files are, but no record among them.
    """
    paths: list[Path] = []
    for place in map(Path, _several(places)):
        if not place.exists():
            raise ValueError(f"there is no record or folder of records {place}: run a recipe first.")
        paths += sorted(place.glob("*.json")) if place.is_dir() else [place]
    records, problems = read_records(paths)
    if problems and not records:
        raise ValueError(problems[0])
    return records, problems


def _read(paths: Iterable[Path], kind: type[Kind], word: str) -> tuple[list[Kind], list[str]]:
    found, problems = [], []
    for path in paths:
        try:
            values = read_json(path)
            read = kind.model_validate(values)
            require_unchanged(values)
            if kind is Record:
                _Readable.model_validate({**values, "cost": values["cost"] or None})
            found.append(read)
        except (ValueError, OSError, RecursionError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{path} is not a {word} of moe-compress: {_first(error)}")
    return found, problems


def _first(error: Exception) -> str:
    """The first thing that is wrong, in a line."""
    if isinstance(error, ValidationError):
        wrong = error.errors()[0]
        return f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    return str(error).splitlines()[0]


def require_unchanged(values: Mapping[str, Any]) -> None:
    """ValueError if the digest in what was saved does not fit; the first version had none."""
    digest = values.get("digest")
    if digest is None and values.get("version", 0) < VERSION:
        return
    if digest != digest_of(values):
        raise ValueError("it was changed after it was written, for its digest does not fit")
