"""Columns of tables from the reports of the tasks harness. Nothing of torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compress.reports.companions import Columns, CompanionResult, JoinedColumns, join
from moe_compress.reports.reading import ValidMetric
from moe_compress.reports.record import Record


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


def accuracies(found: Sequence[CompanionResult], records: Sequence[Record]) -> JoinedColumns:
    """Answers to the tasks, in the arithmetic, which most were asked."""
    kept, most, left = join(found, records)
    return JoinedColumns({name: each.values for name, each in kept.items()}, ", ".join(map(str, most)) + left)


COLUMNS = Columns(asked, accuracies)
