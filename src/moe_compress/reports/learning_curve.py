"""Curves of a training over its steps: losses, and what its checkpoints were found to be. It knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.reports import svg
from moe_compress.reports.record import write_whole
from moe_compress.reports.templates import template
from moe_compress.utils.text import printable

TEMPLATE = "curve.svg.j2"
# Metric -> what its panel is called; tasks have one together.
SHOWN = {
    "kl": "KL to the original, nats",
    "perplexity": "perplexity",
    "top1_agreement": "same top token as the original",
}
TASKS, TASK, ACCURACY = "share of right answers", "accuracy_", "accuracy"
LOSS = "loss, mean since the checkpoint before"
LOSS_OF_STEP = "loss of a step"
# Where there are several tasks, `accuracy` is their average.
AVERAGE = "average"
Interval = Sequence[float] | None


@dataclass(frozen=True)
class Line:
    """One number over steps: (step, value, interval); original: the same number of the original, where it has one."""

    name: str
    points: Sequence[tuple[int, float, Interval]]
    original: float | None = None


# By the title of its panel.
Curves = Mapping[str, Sequence[Line]]


def curves_of(evaluations: Sequence[Mapping[str, Any]]) -> Curves:
    """Panels of what these (as JSON, in any order) hold; those that failed hold nothing."""
    good = [each for each in evaluations if not each["error"]]
    steps = sorted((each for each in good if each["step"] is not None), key=lambda each: each["step"])
    original: Mapping[str, Any] = next((each["metrics"] for each in good if each["step"] is None), {})
    names = dict.fromkeys(name for each in steps for name in each["metrics"])
    terms = dict.fromkeys(term for each in steps for term in each["losses"])
    found: dict[str, list[Line]] = {}
    losses = [
        Line(term, [(each["step"], each["losses"][term], None) for each in steps if term in each["losses"]])
        for term in terms
    ]
    if losses:
        found[LOSS] = losses
    for metric, title in SHOWN.items():
        if metric in names:
            found[title] = [_line(metric, metric, steps, original)]
    tasks = [name for name in names if name.startswith(TASK)]
    wanted = {name: name.removeprefix(TASK) for name in tasks}
    if ACCURACY in names and len(tasks) != 1:
        wanted[ACCURACY] = AVERAGE if tasks else ACCURACY
    if wanted:
        found[TASKS] = [_line(metric, name, steps, original) for metric, name in wanted.items()]
    return found


def curves_of_losses(steps: Sequence[int], losses: Mapping[str, Sequence[float]]) -> Curves:
    """The panel of losses by term at these steps."""
    lines = [
        Line(name, [(step, value, None) for step, value in zip(steps, values, strict=True)])
        for name, values in losses.items()
    ]
    return {LOSS_OF_STEP: lines} if steps and lines else {}


def _line(metric: str, name: str, steps: Sequence[Mapping[str, Any]], original: Mapping[str, Any]) -> Line:
    points = [
        (each["step"], each["metrics"][metric]["value"], each["metrics"][metric]["interval"])
        for each in steps
        if metric in each["metrics"]
    ]
    return Line(name, points, original[metric]["value"] if metric in original else None)


def pictures(curves: Curves) -> list[dict[str, Any]]:
    """The panels as pictures of a page."""
    steps = sorted({step for lines in curves.values() for line in lines for step, _, _ in line.points})
    return [svg.lines(title, lines, steps) for title, lines in curves.items()]


def write(stem: Path, title: str, curves: Curves, png: bool = False) -> list[Path]:
    """Write the panels as one SVG, and as PNG if that is asked for; returns the paths."""
    drawn = template(TEMPLATE).render(svg.column(title, pictures(curves)))
    files = [write_whole(stem.with_name(f"{stem.name}.svg"), printable(drawn) + "\n")]
    if not png:
        return files
    from moe_compress.reports import plots  # matplotlib: a second that only a PNG needs

    return [*files, *plots.curves(stem, title, curves)]
