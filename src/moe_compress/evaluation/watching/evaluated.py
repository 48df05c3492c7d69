"""What one checkpoint of a training was found to be: a file each, from which a killed watch knows what is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.reports.reading import require_unchanged
from moe_compress.utils.files import read_json
from moe_compress.utils.logging import log

ORIGINAL = "original"
# What best=accuracy and the curve mean: the tasks that were asked for, or else what the evaluation itself asks.
ACCURACY = "accuracy"
TASK = "accuracy_"


@dataclass(frozen=True, kw_only=True)
class Evaluation(SavedReport):
    """Of one checkpoint, or of the original (which has no step), under one protocol; or why there is none.

    model: the training's name; run: its identity; checkpoint: that of what was evaluated; tokens: of the training up to
    there; losses: means over its steps since the checkpoint before; metrics: value, unit and interval by name; error:
    of the last attempt, if none came to an end; protocol: what else the numbers depend on; id: of checkpoint and
    protocol.
    """

    model: str
    run: str
    checkpoint: str
    step: int | None
    final: bool
    tokens: int
    losses: dict[str, float]
    protocol: str
    id: str
    written: str
    seconds: float
    attempts: int = 1
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    record: str = ""
    error: str = ""

    @property
    def file_name(self) -> str:
        """By the step, so that the folder lists them in their order."""
        return f"{self.title}-{self.id[:6]}"

    @property
    def title(self) -> str:
        """`original`, or the step."""
        return ORIGINAL if self.step is None else f"step-{self.step:05d}"

    def value(self, metric: str) -> float | None:
        """Of a metric; None where it has none."""
        return self.metrics[metric]["value"] if metric in self.metrics else None

    def markdown(self) -> str:
        """One line."""
        numbers = ", ".join(f"{name} {found['value']:.4g}" for name, found in self.metrics.items())
        return f"{self.title}: {self.error or numbers}"


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """Those of a folder by their identities; a file that is none, or was changed, is named and counts for nothing."""
    found: dict[str, Evaluation] = {}
    names = {each.name for each in dataclasses.fields(Evaluation)}
    for path in sorted(folder.glob("*.json")):
        try:
            values = read_json(path)
            require_unchanged(values)
            one = Evaluation(**{key: value for key, value in values.items() if key in names})
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is no evaluation of a checkpoint, and is made anew: %s.", path, error)
            continue
        found[one.id] = one
    return found


def with_tasks(
    metrics: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Any] | None, side: str
) -> dict[str, dict[str, Any]]:
    """What was measured on text, and of the report of tasks what belongs to one side (`before`, `after`).

    `accuracy` is their average, that of one alone, or else that of the questions that come with the text.
    """
    found = {name: dict(metric) for name, metric in metrics.items()}
    asked = {f"{TASK}{name}": task[side] for name, task in (tasks or {}).get("tasks", {}).items()}
    average = tasks["average"][side] if tasks and tasks["average"] else next(iter(asked.values()), None)
    accuracy = average if average is not None else found.get("task_accuracy")
    return {**found, **asked, **({ACCURACY: accuracy} if accuracy is not None else {})}


def in_order(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The original first, then by steps, whenever they were made."""
    return sorted(evaluations, key=lambda each: -1 if each.step is None else each.step)
