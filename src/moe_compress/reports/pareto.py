"""Pareto fronts of a table, and how sure they are: documents are drawn anew, the same for all models, many times.

A model is on the front if no other is at least as cheap and at least as good, and better in one of the two. R rows
of a table, D documents, B draws. This module knows nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe_compress.reports.companions import LATENCY, JoinedColumns
from moe_compress.reports.record import Metric, Record

DRAWS = 10_000
TAILS = (0.025, 0.975)
# Standard deviations between the ends of a 95 % interval.
SPREAD = 2 * 1.959964
# Beyond this the sums of a file are those of another run.
CLOSE = 1e-4
COSTS = {"bytes": ("size on disk, MiB", 2**20), "flops_per_token": ("MFLOPs per token", 10**6)}
NONE = JoinedColumns({}, "")
Floats = NDArray[np.float64]
Row = Sequence[Record]


@dataclass(frozen=True)
class Drawn:
    """Perplexities [B, R], each row's own [R], and which rows come from sums per document [R]."""

    values_BR: Floats
    perplexity_R: Floats
    paired_R: NDArray[np.bool_]


@dataclass(frozen=True)
class Point:
    """A row of the table on a plot. share: of the draws in which it is on the front; front: on it as measured.

    interval: of the perplexity, paired with the original where both have sums per document; cost_interval: where the
    cost was measured.
    """

    name: str
    cost: float
    perplexity: float
    interval: tuple[float, float]
    cost_interval: tuple[float, float] | None
    front: bool
    share: float


@dataclass(frozen=True)
class Front:
    """The points of a plot, cheapest first; key: what is paid; label: its name and unit; notes: what to know.

    how: the setting in which the cost was measured, '' where it was counted.
    """

    key: str
    label: str
    points: Sequence[Point]
    notes: Sequence[str]
    how: str = ""


def on_front(costs: Floats, values: Floats) -> NDArray[np.bool_]:
    """Which of the last axis' points no other dominates, lower being better in both. [..., R] -> bool [..., R].

    Points that are equal in both do not dominate each other.
    """
    order = np.argsort(costs, axis=-1)
    cost, value = _taken(costs, order), _taken(values, order)
    least = np.minimum.accumulate(value, axis=-1)
    least = np.concatenate([np.full_like(least[..., :1], np.inf), least], axis=-1)  # of the first 0, 1, ... points
    # How many cost less than each point, and how many at most as much.
    places = np.arange(cost.shape[-1])
    below = np.maximum.accumulate(np.where(np.diff(cost, prepend=-np.inf) > 0, places, 0), axis=-1)
    ends = np.where(np.diff(cost, append=np.inf) > 0, places + 1, len(places))
    upto = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    found = (value < _taken(least, below)) & (value == _taken(least, upto))
    return _taken(found, np.argsort(order, axis=-1))


def _taken(values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """Of the last axis; places that are the same in all draws are given once."""
    return values[..., places] if places.ndim == 1 else np.take_along_axis(values, places, -1)


def draw(rows: Sequence[Row], folders: Sequence[Path] = (), draws: int = DRAWS) -> Drawn:
    """Perplexities over documents drawn with replacement; a row of several seeds is the mean of
    as many seeds drawn with replacement.

    A run without sums per document in any of the folders is drawn from its interval, by itself, as if the mean loss
    were normal.
    """
    generator = np.random.default_rng(0)
    sums = {record.name: _sums(record, folders) for row in rows for record in row}
    first = next((found for found in sums.values() if found is not None), None)
    tokens_D = np.ones(1) if first is None else first[1]
    weights_BD = generator.multinomial(len(tokens_D), np.full(len(tokens_D), 1 / len(tokens_D)), draws).astype(float)
    total_B = weights_BD @ tokens_D
    columns, paired = [], []
    for row in rows:
        nll = [_same_text(sums[record.name], tokens_D) for record in row]
        paired.append(all(each is not None for each in nll))
        runs = [
            _alone(record.metrics["perplexity"], draws, generator)
            if each is None
            else np.exp(weights_BD @ each / total_B)
            for record, each in zip(row, nll, strict=True)
        ]
        # Seeds are drawn anew as well: of one seed, that is it.
        chosen_RB = generator.integers(len(runs), size=(len(runs), draws))
        columns.append(np.take_along_axis(np.stack(runs), chosen_RB, 0).mean(0))
    measured = [np.mean([record.metrics["perplexity"].value for record in row]) for row in rows]
    return Drawn(np.stack(columns, axis=1), np.array(measured), np.array(paired))


def _sums(record: Record, folders: Sequence[Path]) -> tuple[Floats, Floats] | None:
    """The run's nll [D] in nats and tokens [D]; None where no folder has them, or only those of another run."""
    for folder in folders:
        try:
            found = load_file(folder / f"{record.name}.safetensors")
            nll, tokens = found["nll"].astype(np.float64), found["tokens"].astype(np.float64)
        except (OSError, SafetensorError, KeyError):
            continue
        if abs(nll.sum() / tokens.sum() - np.log(record.metrics["perplexity"].value)) < CLOSE:
            return nll, tokens
    return None


def _same_text(sums: tuple[Floats, Floats] | None, tokens_D: Floats) -> Floats | None:
    return sums[0] if sums is not None and np.array_equal(sums[1], tokens_D) else None


def _alone(metric: Metric, draws: int, generator: np.random.Generator) -> Floats:
    """Draws [B] of something positive whose logarithm is normal, as wide as its interval."""
    low, high = metric.interval or (metric.value, metric.value)
    return np.exp(generator.normal(np.log(metric.value), np.log(high / low) / SPREAD, draws))


def make_fronts(
    names: Sequence[str],
    rows: Sequence[Row],
    folders: Sequence[Path] = (),
    speedups: JoinedColumns = NONE,
) -> list[Front]:
    """Perplexity against bytes, FLOPs and latency: of rows with a perplexity, the original among them.

    A front needs two rows whose cost is known.
    """
    kept = [at for at, row in enumerate(rows) if all(_finite(record) for record in row)]
    names, rows = [names[at] for at in kept], [rows[at] for at in kept]
    if not rows:
        return []
    drawn = draw(rows, folders)
    intervals = _intervals(rows, drawn)
    fronts = [
        _front(key, label, names, [_size(row, key, unit) for row in rows], drawn, intervals)
        for key, (label, unit) in COSTS.items()
    ]
    timed = [_latency(row, speedups) for row in rows]
    latency = _front(LATENCY, "decoding time / the original's", names, timed, drawn, intervals)
    fronts.append(replace(latency, how=f"decoding {speedups.how}"))
    return [front for front in fronts if len(front.points) > 1]


def _finite(record: Record) -> bool:
    """Whether it has a perplexity that a plot can show."""
    found = record.metrics.get("perplexity")
    return found is not None and found.value > 0 and bool(np.isfinite([found.value, *(found.interval or ())]).all())


def _size(row: Row, key: str, unit: float) -> Metric | None:
    return Metric(value=row[0].sizes[key] / unit, unit="") if key in row[0].sizes else None


def _latency(row: Row, speedups: JoinedColumns) -> Metric | None:
    if row[0].form == "original":
        return Metric(value=1.0, unit="ratio")
    return next((speedups.by_record[record.name][LATENCY] for record in row if record.name in speedups.by_record), None)


def _front(
    key: str,
    label: str,
    names: Sequence[str],
    costs: Sequence[Metric | None],
    drawn: Drawn,
    intervals: Sequence[tuple[float, float]],
) -> Front:
    known = [(at, cost) for at, cost in enumerate(costs) if cost is not None]
    kept, paid = [at for at, _ in known], [cost for _, cost in known]
    if not known:
        return Front(key, label, [], [])
    perplexity_R, values_BR = drawn.perplexity_R[kept], drawn.values_BR[:, kept]
    share_R = on_front(_drawn_costs(paid, len(values_BR)), values_BR).mean(axis=0)
    front_R = on_front(np.array([cost.value for cost in paid]), perplexity_R)
    points = [
        Point(names[at], cost.value, float(perplexity_R[i]), intervals[at], cost.interval, bool(front), float(share))
        for i, (at, cost, front, share) in enumerate(zip(kept, paid, front_R, share_R, strict=True))
    ]
    order = sorted(points, key=lambda point: (point.cost, point.perplexity))
    return Front(key, label, order, _notes(drawn.paired_R[kept]))


def _drawn_costs(costs: Sequence[Metric], draws: int) -> Floats:
    """[B, R] where a cost has an interval, else [R]."""
    if all(cost.interval is None for cost in costs):
        return np.array([cost.value for cost in costs])
    generator = np.random.default_rng(1)
    return np.stack([_alone(cost, draws, generator) for cost in costs], axis=1)


def _intervals(rows: Sequence[Row], drawn: Drawn) -> list[tuple[float, float]]:
    """Of each row's perplexity: of its ratio to the original's at the original's own, where both were drawn together.

    What the text has to do with it is the same for all models, and would hide what tells them apart.
    """
    base = next((at for at, row in enumerate(rows) if row[0].form == "original"), None)
    found = []
    for at in range(len(rows)):
        values_B = drawn.values_BR[:, at]
        if base is not None and drawn.paired_R[base] and drawn.paired_R[at]:
            values_B = values_B / drawn.values_BR[:, base] * drawn.perplexity_R[base]
        found.append(tails(values_B))
    return found


def tails(values_B: Floats) -> tuple[float, float]:
    """The ends of the middle 95 % of draws, as np.quantile has them, which would import masked arrays for it."""
    places_B = np.linspace(0, 1, len(values_B))
    low, high = np.interp(TAILS, places_B, np.sort(values_B))
    return float(low), float(high)


def _notes(paired_R: Iterable[Any]) -> list[str]:
    alone = sum(not paired for paired in paired_R)
    notes = [
        f"On the front: the share of {DRAWS:,} draws of the documents in which no other row is at least as cheap and "
        "at least as good. Intervals of perplexity are 95 %, paired with the original: what the text does to all rows "
        "alike is left out."
    ]
    if alone:
        notes.append(
            f"{alone} of these rows have no sums per document: they were drawn from their own intervals, as if their "
            "mean losses were normal and independent, and their intervals are not paired."
        )
    return notes
