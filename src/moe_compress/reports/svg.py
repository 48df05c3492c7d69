"""Where things stand in SVG, on the page and in files: numbers in, pixels, ticks and names out; templates draw them.

This module knows nothing of ours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compress.reports.learning_curve import Line
    from moe_compress.reports.pareto import Front, Point

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 48
CELL, SHADES = 9, 16
LABELS = 44
BAR_HEIGHT = 64
TICKS = 6
# What is on a front in so many of the draws is named, and everything where there are few; names are cut at a length.
OFTEN, FEW, NAME = 0.05, 16, 70
# Numbers that are nearer than this, across and up, would touch; those that are this near to the edge stand before it.
NEAR, EDGE = (15, 11), 100
LEGEND = ("orange: on the front as measured", "%: on it in so many of the draws")
# Of a panel of lines over steps.
PANEL_WIDTH, PANEL_HEIGHT, COLOURS = 420, 190, 4
# Of a picture of its own: room above for the title, to the right for the names; the height and the length of a line.
TITLE, NAMES, LINE, LONG = 28, 500, 15, 180


@dataclass(frozen=True)
class Axis:
    """A scale: values from `low` to `high` onto pixels from `start` to `end`.

    root: by the square root of the logarithm of what they are times `low`, so that the good ones, which differ by
    little, and the bad ones, which differ by much, can be told apart on one plot.
    """

    low: float
    high: float
    start: float
    end: float
    root: bool = False

    def __call__(self, value: float) -> float:
        """The pixel; what lies outside is moved to the edge."""
        low, high, at = (self._scaled(each) for each in (self.low, self.high, min(max(value, self.low), self.high)))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.sqrt(math.log(value / self.low)) if self.root else value

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels of round values, and the values."""
        if self.root:
            steps = [n / TICKS * self._scaled(self.high) for n in range(TICKS + 1)]
            labels = [f"{self.low * math.exp(step**2):.4g}" for step in steps]
            return [(self(float(label)), label) for label in dict.fromkeys(labels)]
        step = _step(self.high - self.low)
        values = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self(value), f"{value:.6g}") for value in values]


def _step(span: float) -> float:
    rough = span / TICKS
    ten = 10.0 ** math.floor(math.log10(rough))
    return next(m * ten for m in (1, 2, 5, 10) if m * ten >= 0.7 * rough)


def axis(values: Iterable[float], start: float, end: float) -> Axis:
    """A scale that has room for all values that are finite."""
    shown = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(shown), max(shown)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def perplexity_axis(points: Sequence[Point], start: float, end: float) -> Axis:
    """A scale for the points' perplexities and their intervals, from the lowest end up."""
    ends = [end for point in points for end in (*point.interval, point.perplexity) if math.isfinite(end) and end > 0]
    low, high = min(ends, default=1.0), max(ends, default=1.0)
    return Axis(low, max(high, low * 1.001), start, end, root=True)


def named(front: Front) -> list[Point]:
    """The points that have a number, counted from one: those that are often on the front; all, where there are few."""
    few = len(front.points) <= FEW
    return [point for point in front.points if few or point.front or point.share >= OFTEN]


def names(front: Front) -> list[str]:
    """What stands beside a plot for each number: the name, cut where it is long, and the share of the draws."""
    found = []
    for number, point in enumerate(named(front), 1):
        name, *rest = textwrap.wrap(point.name, NAME) or [""]
        found.append(f"{number}  {name}{' ...' if rest else ''}: {point.share:.0%}")
    return found


def numbers(front: Front) -> dict[Point, str]:
    """What stands at points: their numbers, with those of later points that are too near for a number of their own."""
    across, up = _scales(front)
    places = {point: (across(point.cost), up(point.perplexity)) for point in named(front)}
    found: dict[Point, str] = {}
    for number, (point, (x, y)) in enumerate(places.items(), 1):
        near = (other for other in found if abs(places[other][0] - x) < NEAR[0] and abs(places[other][1] - y) < NEAR[1])
        first = next(near, point)
        found[first] = f"{found[first]}, {number}" if first in found else f"{number}"
    return found


def scatter(front: Front) -> dict[str, Any]:
    """A plot of a front: points with whiskers and numbers, the line through those on the front, ticks."""
    across, up = _scales(front)
    stairs = [(across(point.cost), up(point.perplexity)) for point in front.points if point.front]
    line = "".join(f"{'H' if n else 'M'}{x}{'V' if n else ' '}{y}" for n, (x, y) in enumerate(stairs))
    return {
        "front": front,
        "points": [_dot(point, across, up) for point in sorted(front.points, key=lambda p: p.front)],
        "line": line,
        "xticks": across.ticks(),
        "yticks": up.ticks(),
        "named": named(front),
        "numbers": [_beside(across(point.cost), up(point.perplexity), text) for point, text in numbers(front).items()],
    }


def picture(title: str, front: Front) -> dict[str, Any]:
    """The same as a picture of its own, with lines of text around it."""
    right = [*LEGEND, "", *names(front)]
    below = textwrap.wrap(front.how, LONG)
    return {
        "found": scatter(front),
        "title": title,
        "above": TITLE,
        "width": WIDTH + NAMES,
        "height": TITLE + max(HEIGHT + LINE * len(below), TOP + LINE * len(right)) + LINE,
        "right": [(WIDTH, TITLE + TOP + LINE * n, text) for n, text in enumerate(right, 1) if text],
        "below": [(LEFT, TITLE + HEIGHT + LINE * n, text) for n, text in enumerate(below, 1)],
    }


def _scales(front: Front) -> tuple[Axis, Axis]:
    """Of costs, to the right, and of perplexities, upwards."""
    costs = [end for point in front.points for end in (point.cost, *(point.cost_interval or ()))]
    return axis(costs, LEFT, WIDTH - RIGHT), perplexity_axis(front.points, HEIGHT - BOTTOM, TOP)


def _beside(x: float, y: float, text: str) -> tuple[float, float, str, str]:
    """Where a point's numbers stand, and which end of them."""
    return (x - 5, y - 5, "end", text) if x > WIDTH - EDGE else (x + 5, y - 5, "start", text)


def _dot(point: Point, across: Axis, up: Axis) -> dict[str, Any]:
    x, y = across(point.cost), up(point.perplexity)
    low, high = (across(end) for end in point.cost_interval or (point.cost, point.cost))
    ends = up(point.interval[0]), up(point.interval[1])
    return {"point": point, "x": x, "y": y, "whiskers": f"M{x} {ends[0]}V{ends[1]}M{low} {y}H{high}"}


def heat(title: str, rows: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Rows of cells, darker for more; negative ones are of another colour, and what is unknown is left out."""
    known = [abs(value) for row in rows.values() for value in row if value is not None and math.isfinite(value)]
    most = max(known, default=0.0) or 1.0
    shades: dict[tuple[int, bool], list[str]] = {}
    for at, row in enumerate(rows.values()):
        for column, value in enumerate(row):
            if value is not None and math.isfinite(value):
                square = f"M{LABELS + column * CELL} {at * CELL}h{CELL - 1}v{CELL - 1}h-{CELL - 1}z"
                shades.setdefault((round(abs(value) / most * SHADES), value < 0), []).append(square)
    return {
        "kind": "heat",
        "title": title,
        "most": f"{most:.4g}",
        "width": LABELS + CELL * max(map(len, rows.values()), default=0),
        "height": CELL * len(rows),
        "labels": _labels(list(rows)),
        "shades": [(f"{shade / SHADES:.2f}", negative, "".join(found)) for (shade, negative), found in shades.items()],
    }


def _labels(names: Sequence[str]) -> list[tuple[int, str]]:
    """So many names that they do not touch."""
    return [(at * CELL + CELL - 1, name) for at, name in enumerate(names) if at % 2 == 0 or len(names) < 3]


def bars(title: str, values: Mapping[str, float], ends: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """A bar a layer from zero up, with whiskers where there are intervals."""
    ends = ends or {}
    shown = {name: value for name, value in values.items() if math.isfinite(value)}
    most = max([*shown.values(), *(max(pair) for pair in ends.values())], default=0.0) or 1.0
    scale = Axis(0.0, most, BAR_HEIGHT, 0)
    wide = 2 * CELL
    found = []
    for at, (name, value) in enumerate(shown.items()):
        x, y = LABELS + at * wide, scale(value)
        whisker = f"M{x + CELL - 2} {scale(ends[name][0])}V{scale(ends[name][1])}" if name in ends else ""
        found.append(
            {"x": x, "y": y, "height": round(BAR_HEIGHT - y, 1), "name": name, "value": f"{value:.4g}"}
            | {"whisker": whisker}
        )
    return {
        "kind": "bars",
        "title": title,
        "most": f"{most:.4g}",
        "width": LABELS + wide * len(found),
        "height": BAR_HEIGHT,
        "bars": found,
    }


def lines(title: str, drawn: Sequence[Line], steps: Sequence[int]) -> dict[str, Any]:
    """Lines over steps, with whiskers where there are intervals, and the original's value as a level.

    steps: those that the scale has room for, so that panels of one training have the same.
    """
    shown = [(line, [point for point in line.points if math.isfinite(point[1])]) for line in drawn]
    values = [end for _, points in shown for _, value, ends in points for end in (value, *(ends or ()))]
    levels = [line.original for line in drawn if line.original is not None]
    across = axis(steps, LEFT, PANEL_WIDTH - RIGHT)
    up = axis([*values, *levels], PANEL_HEIGHT - BOTTOM, TOP)
    return {
        "kind": "lines",
        "title": title,
        "width": PANEL_WIDTH,
        "height": PANEL_HEIGHT,
        "right": PANEL_WIDTH - RIGHT,
        "bottom": PANEL_HEIGHT - BOTTOM,
        "xticks": [(x, label) for x, label in across.ticks() if label.isdigit()],
        "yticks": up.ticks(),
        "lines": [_polyline(number, line, points, across, up) for number, (line, points) in enumerate(shown)],
    }


def _polyline(
    number: int, line: Line, points: Sequence[tuple[int, float, Sequence[float] | None]], across: Axis, up: Axis
) -> dict[str, Any]:
    places = [(across(step), up(value)) for step, value, _ in points]
    return {
        "name": line.name,
        "colour": number % COLOURS,
        "path": "".join(f"{'L' if n else 'M'}{x} {y}" for n, (x, y) in enumerate(places)),
        "whiskers": "".join(f"M{across(step)} {up(ends[0])}V{up(ends[1])}" for step, _, ends in points if ends),
        "level": None if line.original is None else up(line.original),
        "points": [
            (x, y, f"{line.name}, step {step}: {value:.4g}")
            for (x, y), (step, value, _) in zip(places, points, strict=True)
        ],
    }


def column(title: str, panels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Panels of lines below each other, as a picture of its own."""
    places = [(TITLE + number * (PANEL_HEIGHT + TITLE), panel) for number, panel in enumerate(panels)]
    height = TITLE + len(panels) * (PANEL_HEIGHT + TITLE)
    return {"title": title, "panels": places, "width": PANEL_WIDTH + NAMES // 2, "height": height}
