"""One summary of the score grid, from the records alone: results/summary.md, and the same table in the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_compress.report.record import Record, load_records

BEGIN, END = "<!-- summary: made by scripts/benchmark/tables.sh -->", "<!-- end of summary -->"
METRIC = "delta_nll"


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
    for record in records:
        if len(record.recipe) != 1 or record.recipe[0]["method"] != "expert_drop":
            continue
        given = dict(record.recipe[0]["given"])
        row, ratio = given.pop("score"), given.pop("ratio", None)
        given.pop("seed", None)
        if ratio is not None and not given:
            grid.setdefault(row, {}).setdefault((record.model, ratio), []).append(record)
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
