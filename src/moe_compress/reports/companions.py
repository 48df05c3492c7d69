"""What other commands left beside the records, read for the page. This module knows nothing of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_compress.reports.reading import ValidMetric, require_unchanged
from moe_compress.reports.record import Metric, Record
from moe_compress.utils import files

Read = TypeVar("Read")

LATENCY = "latency"
STARTS_NEEDED = 5  # below it, lowest and highest of the starts are less than 93 % sure to hold the median


@dataclass(frozen=True)
class CompanionResult:
    """What a command found out of a checkpoint beside its original.

    values: by what a table calls them; what: all that they depend on besides the two models; fingerprint: the
    checkpoint's; busy: whether the machine was; narrow: whether intervals are, as of too few starts.
    """

    model: str
    fingerprint: str
    original: str
    what: tuple[Any, ...]
    values: Mapping[str, ValidMetric]
    busy: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        hash((self.what, *map(str.strip, (self.model, self.fingerprint, self.original))))  # TypeError for other types


@dataclass(frozen=True)
class Columns:
    """What the reports of a harness add to tables.

    read: a report's JSON -> what it found out of checkpoints; join: what belongs to the rows of a table; cost: the
    column that counts as a cost on fronts, "" for none.
    """

    read: Callable[[Any], list[CompanionResult]]
    join: Callable[[Sequence[CompanionResult], Sequence[Record]], JoinedColumns]
    cost: str = ""


@dataclass(frozen=True)
class JoinedColumns:
    """Values of one kind by record, and in words what they depend on ('' without any)."""

    by_record: Mapping[str, Mapping[str, Metric]]
    how: str


def read_json(paths: Iterable[Path], use: Callable[[Any], Read], kind: str) -> tuple[list[Read], list[str]]:
    """What `use` makes of each file, and a sentence for each file that it can make nothing of."""
    found: list[Read] = []
    problems = []
    for path in paths:
        try:
            values = files.read_json(path)
            require_unchanged(values)
            found.append(use(values))
        except (ValueError, OSError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problems.append(f"{path} is no {kind} file of moe-compress: {type(error).__name__} {error}")
    return found, problems


def join(
    found: Sequence[CompanionResult], records: Sequence[Record]
) -> tuple[dict[str, CompanionResult], tuple[Any, ...], str]:
    """Of every record that has some, what most have, what that depends on, and in words how much else there is."""
    pairs = [(each, record.name) for each in found for record in records if made(each, record)]
    if not pairs:
        return {}, (), ""
    most, _ = Counter(each.what for each, _ in pairs).most_common(1)[0]
    others = len({(each.what, name) for each, name in pairs if each.what != most})
    left = f"; not shown, as measured in other settings: {others}" if others else ""
    return {name: each for each, name in pairs if each.what == most}, most, left


def made(found: CompanionResult, record: Record) -> bool:
    """Whether a record is of this checkpoint: by fingerprint, or by a name that may end in what it was measured on."""
    if record.model != found.original:
        return False
    if record.fingerprint is not None:
        return found.fingerprint == record.fingerprint
    return bool(re.fullmatch(f"{re.escape(found.model)}(-[0-9a-f]{{6}})?", record.name))
