"""Pictures by matplotlib: analyses as PNG and SVG, fronts as PNG. This module knows nothing of ours.

Colours tell apart what colour-blind readers can tell apart: cividis and PuOr for tables, Okabe and Ito's for lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_compress.reports import svg
from moe_compress.reports.learning_curve import Curves
from moe_compress.reports.pareto import Front
from moe_compress.utils.files import room_for

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
TICKS = 16
COLUMNS = 6
DPI = 150
ALIKE = "PuOr_r"
LEAST_LIMIT = 0.2
HIGH, WIDE = 1000, 80
WHISKER: dict[str, Any] = {"colors": "grey", "linewidth": 0.7}
META: dict[str, dict[str, Any]] = {".svg": {"metadata": {"Date": None}}}
Table = Sequence[Sequence[float | None]]


def utilization(stem: Path, layers: Sequence[int], shares: Table) -> list[Path]:
    """Layers x experts: each expert's share of tokens over the layer's mean share."""
    relative = [[(value or 0.0) * len(row) / max(sum(v or 0.0 for v in row), 1e-12) for value in row] for row in shares]
    return _experts_by_layer(stem, layers, relative, "Utilization", "share of tokens\n/ the layer's mean")


def scores(stem: Path, layers: Sequence[int], values: Table, name: str) -> list[Path]:
    """Layers x experts: a score over the layer's largest, so that layers can be seen together; blank where unknown."""
    relative = [
        [None if value is None else value / max((v for v in row if v is not None), default=1.0) for value in row]
        for row in values
    ]
    return _experts_by_layer(stem, layers, relative, f"{name} by layer", f"{name}\n/ the layer's largest")


def _experts_by_layer(stem: Path, layers: Sequence[int], values: Table, title: str, unit: str) -> list[Path]:
    width = max(map(len, values))
    padded = [
        [*(float("nan") if v is None else v for v in row), *[float("nan")] * (width - len(row))] for row in values
    ]
    figure = Figure(
        figsize=(max(5.0, min(16.0, 1.5 + 0.12 * width)), max(2.8, 1.6 + 0.3 * len(layers))), layout="constrained"
    )
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(padded, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    axes.set(title=title, xlabel="expert", ylabel="layer")
    axes.set_yticks(*_ticks(layers))
    axes.set_xticks(*_ticks(range(width)))
    figure.colorbar(image, ax=axes, label=unit, aspect=30)
    return _saved(figure, stem)


def similarity(stem: Path, layers: Sequence[int], matrices: Sequence[Table]) -> list[Path]:
    """Small multiples: the cosine between the outputs of every two experts, a panel a layer."""
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = [axes for row in grid for axes in row]
    # The diagonal says nothing; without it the scale fits what there is to see.
    away = [[[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(m)] for m in matrices]
    limit = max([LEAST_LIMIT, *(abs(v) for matrix in away for row in matrix for v in row if v is not None)])
    scale = Normalize(-limit, limit)
    for axes, layer, matrix in zip(panels, layers, away, strict=False):
        axes.set_facecolor("lightgrey")
        axes.imshow(_numbers(matrix), cmap=ALIKE, norm=scale, interpolation="nearest")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xticks(*_ticks(range(len(matrix)), 4))
        axes.set_yticks(*_ticks(range(len(matrix)), 4))
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    figure.supxlabel("expert")
    figure.supylabel("expert")
    figure.suptitle("Mean cosine of two experts' outputs on the same tokens", fontsize=11)
    figure.colorbar(ScalarMappable(scale, ALIKE), ax=panels, label="cosine", shrink=0.8, aspect=40)
    return _saved(figure, stem)


def turns(stem: Path, curves: Mapping[str, Mapping[int, float]]) -> list[Path]:
    """Lines over layers: how far the stream is turned by a layer and by its sub-layers (1 - cosine)."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, by_layer) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(list(by_layer), list(by_layer.values()), label=name, markersize=4, **style)
    axes.set(title="How much each layer turns the stream", xlabel="layer", ylabel="1 - cosine of before and after")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return _saved(figure, stem)


def _numbers(table: Table) -> list[list[float]]:
    """What is unknown as NaN, which is left blank."""
    return [[float("nan") if value is None else value for value in row] for row in table]


def _ticks(values: Sequence[int], most: int = TICKS) -> tuple[list[int], list[str]]:
    """At most so many places, evenly spaced, and what stands there."""
    step = -(-len(values) // most)
    places = list(range(0, len(values), step))
    return places, [str(values[place]) for place in places]


def _saved(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """One file of each kind."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    # Without salt and date, a second run would write other bytes.
    with rc_context({"svg.hashsalt": "moe-compress"}):
        for path in files:
            with room_for(path):
                figure.savefig(path, dpi=DPI, **META.get(path.suffix, {}))
    return files


def front(stem: Path, title: str, found: Front) -> list[Path]:
    """A front as PNG, with the numbers and the names that it has as SVG: perplexity with whiskers over cost."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    axes = figure.subplots()
    up = svg.perplexity_axis(found.points, 0, HIGH)
    for points, colour in ((found.points, LINES[0]), ([point for point in found.points if point.front], LINES[1])):
        x, y = [point.cost for point in points], [up(point.perplexity) for point in points]
        axes.vlines(
            x, *zip(*((up(low), up(high)) for low, high in (p.interval for p in points)), strict=True), **WHISKER
        )
        axes.hlines(y, *zip(*(p.cost_interval or (p.cost, p.cost) for p in points), strict=True), **WHISKER)
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.8)
    for point, numbers in svg.numbers(found).items():
        place = (point.cost, up(point.perplexity))
        axes.annotate(numbers, place, (4, 4), textcoords="offset points", fontsize=7)
    for name in svg.names(found):
        axes.plot([], [], " ", label=name.replace("$", r"\$"))
    below = f"{found.label} ({found.how})" if found.how else found.label
    plain = [text.replace("$", r"\$") for text in (title, textwrap.fill(below, WIDE))]
    axes.set(title=plain[0], xlabel=plain[1], ylabel="perplexity, root of log scale")
    axes.set_yticks(*zip(*up.ticks(), strict=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, handlelength=0, title="\n".join(svg.LEGEND))
    return _saved(figure, stem, ("png",))


def curves(stem: Path, title: str, found: Curves) -> list[Path]:
    """Curves over steps as PNG, a panel each: lines with whiskers, dashed where the original is."""
    figure = Figure(figsize=(8.0, 2.4 * len(found) + 0.6), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, lines) in zip(panels, found.items(), strict=True):
        for place, line in enumerate(lines):
            style: dict[str, Any] = {"color": LINES[place % len(LINES)]}
            steps, values = [step for step, _, _ in line.points], [value for _, value, _ in line.points]
            label = line.name.replace("$", r"\$")
            axes.plot(steps, values, label=label, marker=MARKERS[place % len(MARKERS)], markersize=4, **style)
            for step, _, ends in line.points:
                axes.vlines([step], *([end] for end in ends or ()), **WHISKER) if ends else None
            if line.original is not None:
                axes.axhline(line.original, linestyle="--", linewidth=0.9, **style)
        axes.set_title(name.replace("$", r"\$"), fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[-1].set_xlabel("steps")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    return _saved(figure, stem, ("png",))
