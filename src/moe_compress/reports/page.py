"""One static HTML page of tables, fronts and pictures: nothing is fetched, and all text is escaped by the template.

This module knows nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_compress.reports import charts, svg, table_formats
from moe_compress.reports.companions import LATENCY, JoinedColumns
from moe_compress.reports.record import Failure, Metric, Record, now
from moe_compress.reports.table import SAME, Table, row_numbers, sentence_of
from moe_compress.reports.templates import template

if TYPE_CHECKING:
    from moe_compress.reports.pareto import Front

TEMPLATE = "page.html.j2"
ON_FRONT = {"bytes": "on front: bytes", "flops_per_token": "on front: FLOPs", "latency": "on front: latency"}
Context = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A table, its fronts, the runs of its model that did not finish, and what other commands found of its rows."""

    table: Table
    fronts: Sequence[Front] = ()
    failures: Sequence[Failure] = ()
    joined: Mapping[str, JoinedColumns] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """A heading, and pictures of layers below it."""

    title: str
    pictures: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Contents:
    """All that a page shows. failures: of models that have no table; problems: sentences about skipped files."""

    sections: Sequence[Section]
    failures: Sequence[Failure] = ()
    galleries: Sequence[Gallery] = ()
    problems: Sequence[str] = field(default_factory=tuple)


def render(contents: Contents) -> str:
    """The page, whole: styles, scripts and pictures are in it."""
    return template(TEMPLATE).render(
        sections=[_section(at, section) for at, section in enumerate(contents.sections)],
        failures=contents.failures,
        galleries=contents.galleries,
        problems=contents.problems,
        written=now(),
    )


def _section(number: int, section: Section) -> Context:
    table = section.table
    shown = table.cells.filled()
    shares = {front.key: {point.name: point.share for point in front.points} for front in section.fronts}
    extra = [ON_FRONT[key] for key in shares]
    others = _others(table, list(section.joined.values()))
    added = list(dict.fromkeys(column for found in others.values() for column in found))
    names = table.cells.column("recipe")
    ids = {name: _id(table, name) for name in names}
    rows = []
    for name, records, cells in zip(names, table.rows, shown.records(), strict=True):
        of_row = {ON_FRONT[key]: found[name] for key, found in shares.items() if name in found}
        rows.append(_row(ids[name], records, {**cells, **dict.fromkeys(added, "")}, of_row, extra, others[name]))
    return {
        "id": f"table-{number}",
        "title": table.title,
        "how": table.how(),
        "protocol": table.protocol,
        "base": records[0].base,
        "columns": [*shown.titles, *added, *extra],
        "notes": [f"{what}: {joined.how}" for what, joined in section.joined.items() if joined.how],
        "rows": rows,
        "failures": section.failures,
        "plots": [svg.scatter(front) for front in section.fronts],
        "ids": ids,
    }


def _others(table: Table, joined: Sequence[JoinedColumns]) -> dict[str, dict[str, Metric]]:
    """By row: what other commands measured of it."""
    found: dict[str, dict[str, Metric]] = {}
    for name, records in zip(table.cells.column("recipe"), table.rows, strict=True):
        values = [each.by_record[record.name] for each in joined for record in records if record.name in each.by_record]
        found[name] = {key: metric for each in values for key, metric in each.items() if key != LATENCY}
    return found


def _id(table: Table, name: str) -> str:
    """What a row is called in links: the same on every page that shows it."""
    identity = json.dumps([table.title, table.rows[0][0].base, table.protocol["id"], name], sort_keys=True)
    return f"row-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def _row(
    identity: str,
    records: Sequence[Record],
    cells: Mapping[str, str],
    shares: Mapping[str, float],
    extra: Sequence[str],
    others: Mapping[str, Metric],
) -> Context:
    numbers = row_numbers(records) | {column: metric.value for column, metric in others.items()}
    measured = {column: _measured(metric) for column, metric in others.items()}
    texts = {**cells, **measured, **{column: f"{shares[column]:.0%}" if column in shares else "" for column in extra}}
    numbers |= shares
    found = [{"text": text, "number": numbers.get(str(column))} for column, text in texts.items()]
    return {"id": identity, "cells": found, "runs": [_run(record) for record in records]}


def _measured(metric: Metric) -> str:
    """With its interval; a ratio to the original whose interval holds 1 is no detectable difference."""
    low, high = metric.interval or (metric.value, metric.value)
    same = f" {SAME}" if metric.unit == "ratio" and low <= 1 <= high else ""
    return table_formats.with_interval(metric.value, metric.interval, ".3f") + same


def _run(record: Record) -> Context:
    drawn, rest = [], []
    for entry in record.report:
        found, left = charts.of_report(entry)
        drawn += [{**picture, "title": f"{entry.get('method', '')}: {picture['title']}"} for picture in found]
        rest.append(left)
    metrics = [
        (name, table_formats.with_interval(metric.value, metric.interval), metric.unit)
        for name, metric in record.metrics.items()
    ]
    return {
        "name": record.name,
        "sentence": sentence_of(record.recipe) or record.form,
        "facts": {
            "seed": record.seed,
            "form": record.form,
            "written": record.written,
            "digest": record.digest or "none: written by an older version",
            "commit of the original": record.base.get("commit") or "none",
            "fingerprint of the original": record.base["fingerprint"],
        },
        "metrics": metrics,
        "texts": {
            "stages, with every parameter": [_json(stage) for stage in record.recipe],
            "reported by the stages": [_json(left) for left in rest],
            "sizes": [_json(record.sizes)],
            "cost": [_json(record.cost)],
            "environment": [_json(record.environment)],
        },
        "pictures": drawn,
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
