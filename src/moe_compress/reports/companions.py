"""What other commands left beside the records, read for the page. This module knows nothing of ours."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_compress.reports.reading import ValidMetric, require_unchanged
from moe_compress.reports.record import Metric, Record

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
            values = json.loads(path.read_text(encoding="utf-8"))
            require_unchanged(values)
            found.append(use(values))
        except (ValueError, OSError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problems.append(f"{path} is no {kind} file of moe-compress: {type(error).__name__} {error}")
    return found, problems


def timed(speed: Mapping[str, Any]) -> list[CompanionResult]:
    """Every point of a speed file: how many times as fast, and decoding time over the original's."""
    found = speed["found"]
    gpu, setting = found["original"]["gpu"], found["setting"]
    where = gpu["name"] if gpu else speed["environment"]["processor"]
    what = (setting["tokens"], setting["dtype"], setting["device"], where, found["original"]["threads"])
    return [
        CompanionResult(
            speed["model"], speed["fingerprint"], speed["original"], (point["batch"], point["prompt"], *what),
            _speedups(point), bool(found["machine"]["busy"]), point["prefill"].get("starts", 1) < STARTS_NEEDED,
        )
        for point in found["points"]
    ]  # fmt: skip


def _speedups(point: Mapping[str, Any]) -> dict[str, ValidMetric]:
    prefill, decode = (
        ValidMetric(value=point[what]["speedup"], unit="ratio", interval=tuple(point[what]["speedup_interval"]))
        for what in ("prefill", "decode")
    )
    low, high = decode.interval or (decode.value, decode.value)
    if min(low, prefill.value) <= 0:
        raise ValueError("a speedup is a number above zero")
    latency = ValidMetric(value=1 / decode.value, unit="ratio", interval=(1 / high, 1 / low))
    return {"prefill x": prefill, "decoding x": decode, LATENCY: latency}


def asked(report: Mapping[str, Any]) -> list[CompanionResult]:
    """The accuracies of a tasks file, and their average: the checkpoint's, and its original's."""
    side = "before" if report["model"] == report["original"] else "after"

    def values(side: str) -> dict[str, ValidMetric]:
        tasks = {f"{name} right": task[side] for name, task in report["tasks"].items()}
        if report["average"]:
            tasks["average of tasks"] = report["average"][side]
        return {name: ValidMetric(**found) for name, found in tasks.items()}

    what = (*report["tasks"], *(f"{key}={value}" for key, value in sorted(report["settings"].items())))
    found = [CompanionResult(report["model"], report["fingerprint"], report["original"], what, values(side))]
    if side == "after" and "original_fingerprint" in report:
        found.append(
            CompanionResult(
                report["original"], report["original_fingerprint"], report["original"], what, values("before")
            )
        )
    return found


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


def speedups(found: Sequence[CompanionResult], records: Sequence[Record]) -> JoinedColumns:
    """Times at the point and in the setting which most were timed at."""
    kept, most, left = join(found, records)
    if not kept:
        return JoinedColumns({}, "")
    batch, prompt, tokens, dtype, device, where, threads = most
    how = f"{batch} x {tokens} tokens behind prompts of {prompt}, {dtype} on {device} ({where}), {threads} thread(s)"
    busy = sum(each.busy for each in kept.values())
    how += f"; the machine was BUSY for {busy} of them" if busy else ""
    narrow = sum(each.narrow for each in kept.values())
    how += f"; {narrow} of too few starts, so that their intervals are too narrow" if narrow else ""
    return JoinedColumns({name: each.values for name, each in kept.items()}, how + left)


def accuracies(found: Sequence[CompanionResult], records: Sequence[Record]) -> JoinedColumns:
    """Answers to the tasks, in the arithmetic, which most were asked."""
    kept, most, left = join(found, records)
    return JoinedColumns({name: each.values for name, each in kept.items()}, ", ".join(map(str, most)) + left)


def made(found: CompanionResult, record: Record) -> bool:
    """Whether a record is of this checkpoint: by fingerprint, or by a name that may end in what it was measured on."""
    if record.model != found.original:
        return False
    if record.fingerprint is not None:
        return found.fingerprint == record.fingerprint
    return bool(re.fullmatch(f"{re.escape(found.model)}(-[0-9a-f]{{6}})?", record.name))
