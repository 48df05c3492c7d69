"""One summary of the score grid, from the records alone: results/summary.md, and the same table in the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_compress.report.record import Record, load_records
from moe_compress.report.table import one_row_each

BEGIN, END = "<!-- summary: made by scripts/benchmark/tables.sh -->", "<!-- end of summary -->"
METRIC = "delta_nll"
OTHERS = {"budget", "reverse", "protect", "unseen", "keep"}


def cell(records: Sequence[Record]) -> str:
    """Change of NLL with its interval; several seeds: mean, smallest to largest."""
    found = [record.metrics[METRIC] for record in records]
    if not found:
        return ""
    if len(found) == 1:
        low, high = found[0].interval or (float("nan"),) * 2
        return f"{found[0].value:.3f} [{low:.3f}, {high:.3f}]"
    values = [metric.value for metric in found]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)"


def summary(records: Sequence[Record]) -> str:
    """Rows: scores with a uniform budget, best first by their mean over the columns; columns: model and ratio."""
    grid: dict[str, dict[tuple[str, float], list[Record]]] = {}
    for found in one_row_each(records):
        stages = found[0].recipe
        given = dict(stages[0]["given"]) if len(stages) == 1 else {}
        if "score" not in given or "ratio" not in given or not OTHERS.isdisjoint(given):
            continue
        row = given["score"] + (f", {given['gate']} softmax" if "gate" in given else "")
        grid.setdefault(row, {})[found[0].model, given["ratio"]] = found
    columns = sorted({column for found in grid.values() for column in found}, key=lambda c: (c[1], c[0]))
    complete = {row: found for row, found in grid.items() if len(found) == len(columns)}
    order = sorted(complete, key=lambda row: sum(_mean(found) for found in complete[row].values()))
    lines = ["| score | " + " | ".join(f"{model} {ratio:.0%}" for model, ratio in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [f"| {row} | " + " | ".join(cell(complete[row][column]) for column in columns) + " |" for row in order]
    return "\n".join(lines) + "\n"


def _mean(records: Sequence[Record]) -> float:
    return sum(record.metrics[METRIC].value for record in records) / len(records)


def write_summary(results: Path, readme: Path) -> None:
    """Write results/summary.md and put the same table between the README's markers."""
    text = summary(load_records(sorted((results / "records").glob("*.json"))))
    (results / "summary.md").write_text(text, encoding="utf-8")
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
