"""What other commands left beside the records, read for the page. This module knows nothing of ours."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_compress.report.record import Metric, Record, require_unchanged

Read = TypeVar("Read")
SETTING = ("tokens", "dtype", "device")


@dataclass(frozen=True)
class Timed:
    """A checkpoint's decoding time over its original's at one point.

    what: sequences, prompt, setting, processor and GPU; fingerprint: the checkpoint's (None: the file is older).
    """

    model: str
    fingerprint: str | None
    original: str
    what: tuple[Any, ...]
    latency: Metric
    busy: bool


@dataclass(frozen=True)
class Latencies:
    """Decoding time over the original's by record, and what was timed ('' without any)."""

    by_record: Mapping[str, Metric]
    how: str


def read_json(paths: Iterable[Path], use: Callable[[Any], Read], kind: str) -> tuple[list[Read], list[str]]:
    """What `use` makes of each file, and a sentence for each file that it can make nothing of."""
    found: list[Read] = []
    problems = []
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            require_unchanged(values)
            found.append(use(values))
        except (ValueError, OSError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problems.append(f"{path} is no {kind} file of moe-compress: {type(error).__name__} {error}")
    return found, problems


def timed(speed: Mapping[str, Any]) -> list[Timed]:
    """Every point of a speed file."""
    found = speed["found"]
    gpu, threads = found["original"]["gpu"], found["original"]["threads"]
    setting = (*(found["setting"][key] for key in SETTING), threads)
    where = gpu["name"] if gpu else speed["environment"]["processor"]
    return [
        Timed(
            speed["model"], speed["fingerprint"], speed["original"], (p["batch"], p["prompt"], *setting, where),
            _over_original(p["decode"]), bool(found["machine"]["busy"]),
        )
        for p in found["points"]
    ]  # fmt: skip


def _over_original(decode: Mapping[str, Any]) -> Metric:
    low, high = decode["speedup_interval"]
    return Metric(value=1 / decode["speedup"], unit="ratio", interval=(1 / high, 1 / low))


def latencies(found: Sequence[Timed], records: Sequence[Record]) -> Latencies:
    """Of every record that was timed at the point and in the setting which most were timed at.

    Times of other points or in other settings do not belong on the same plot, and are left out.
    """
    pairs = [(each, record.name) for each in found for record in records if made(each, record)]
    if not pairs:
        return Latencies({}, "")
    most, _ = Counter(each.what for each, _ in pairs).most_common(1)[0]
    kept = [(each, name) for each, name in pairs if each.what == most]
    batch, prompt, tokens, dtype, device, threads, where = most
    how = f"decoding {batch} x {tokens} tokens behind prompts of {prompt}, {dtype} on {device} ({where}), "
    how += f"{threads} thread(s)"
    busy = sum(each.busy for each, _ in kept)
    how += f"; the machine was BUSY for {busy} of them" if busy else ""
    return Latencies({name: each.latency for each, name in kept}, how)


def made(timing: Timed, record: Record) -> bool:
    """Whether a record is of this checkpoint: by fingerprint, or by a name that may end in what it was measured on."""
    if record.model != timing.original:
        return False
    if None not in (timing.fingerprint, record.fingerprint):
        return timing.fingerprint == record.fingerprint
    return bool(re.fullmatch(f"{re.escape(timing.model)}(-[0-9a-f]{{6}})?", record.name))
