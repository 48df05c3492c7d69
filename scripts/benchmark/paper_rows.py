"""The table of paper_table.sh from what its jobs left in a folder: Markdown, CSV, LaTeX, JSON, plots and the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_compress.cli.terminal import set_up_logging
from moe_compress.evaluation.flops.report import BINARY, UNITS
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.evaluation.speed.report import ratio
from moe_compress.reports import table_formats
from moe_compress.reports.html_report import make_report
from moe_compress.reports.reading import read_records
from moe_compress.reports.record import Failure, Record, now
from moe_compress.reports.table import SAME
from moe_compress.reports.table_formats import Cells
from moe_compress.utils.files import write_json

HERE = Path(__file__).resolve().parent
STEM = "paper_table"
ORIGINAL = "original"
NAMES = {"awq": "AWQ", "expert_drop": "Expert Drop", "layer_drop": "Layer Drop", "block_drop": "Block Drop"}
MEANING = (
    "Speedup: median of paired ratios beside the original, with its 95 % interval (above 1: faster). FLOPs: of a "
    "prompt of 2,048 tokens. Weights: as stored. Tasks: accuracy in %; average: the plain mean, and its paired "
    "change. Change of NLL: per token of held-out text, nats, paired."
)
IN_PAPER = "in the paper"
PAPERS = (
    f"Rows `{IN_PAPER}`: Table 3 of arXiv 2406.02500 (speed on GPUs, fused AWQ kernels against an eager bf16 loop; "
    "memory in use, not weights)."
)
FAILED = "did not finish"


@dataclass(frozen=True)
class Cell:
    """What is known of one row: its record, timing, FLOPs and tasks (None: missing), and why something is missing."""

    model: str
    name: str
    record: Record | None
    speed: Mapping[str, Any] | None
    flops: Mapping[str, Any] | None
    tasks: Mapping[str, Any] | None
    reasons: Mapping[str, str]

    @property
    def original(self) -> bool:
        """Whether it is the row of the model itself."""
        return self.name == ORIGINAL

    @property
    def title(self) -> str:
        """As in the paper."""
        return " + ".join(NAMES.get(part, part) for part in self.name.split("-"))


def cells(folder: Path, values: Mapping[str, Any]) -> list[Cell]:
    """Every cell of the grid, the original of each model first."""
    records, _ = read_records(sorted((folder / "records").glob("*.json")))
    named = {record.name: record for record in records}
    found = []
    for model in values["models"]:
        of_model = {name: cell for name, cell in values["cells"].items() if cell["model"] == model}
        protocols = {named[name].protocol["id"] for name in of_model if name in named}
        originals = [r for r in records if r.form == ORIGINAL and r.model == model]
        shared = [r for r in originals if not protocols or r.protocol["id"] in protocols]
        latest = max(shared or originals, key=lambda record: record.written, default=None)
        found.append(_cell(folder, model, model, ORIGINAL, latest))
        for name, cell in of_model.items():
            record = named.get(name)
            same = record is None or latest is None or record.protocol["id"] == latest.protocol["id"]
            found.append(_cell(folder, model, name, cell["cell"], record if same else None))
    return found


def _cell(folder: Path, model: str, stem: str, name: str, record: Record | None) -> Cell:
    parts = {
        "record": record,
        "speed": _latest(folder / "speed", stem),
        "flops": _json(folder / "flops" / f"{stem}.json"),
        "tasks": _latest(folder / "tasks", stem),
    }
    reasons = {} if name == ORIGINAL else _reasons(folder / "logs", model, stem, parts)
    return Cell(model, name, **parts, reasons=reasons)


def _latest(folder: Path, stem: str) -> Any:
    """Of several, with other settings, the one that was written last."""
    found = sorted(folder.glob(f"{stem}-??????.json"), key=lambda path: path.stat().st_mtime)
    return _json(found[-1]) if found else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _reasons(logs: Path, model: str, stem: str, parts: Mapping[str, Any]) -> dict[str, str]:
    """Why each missing part is missing: the last words of the job that ended before it."""
    kinds = {"record": "evaluate", "speed": "speed", "flops": "flops", "tasks": "tasks"}
    found = {}
    for part, job in kinds.items():
        if parts[part] is None:
            tried = [logs / job / f"{stem}.txt", logs / "compress" / f"{stem}.txt", logs / ORIGINAL / f"{model}.txt"]
            found[part] = next(
                (f"{path.parent.name}: {_last(path)}" for path in tried if path.is_file()), "not run yet"
            )
    return found


def _last(log: Path) -> str:
    """The error at the end of a log; where there is none, the job was stopped."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    return "stopped" + (f" after saying {lines[-1]!r}" if lines else " before it said anything")


def frame(found: Sequence[Cell], paper: pd.DataFrame) -> pd.DataFrame:
    """Rows of one model in the shape of the paper's table, each of the paper's own numbers below ours."""
    rows = []
    for cell in found:
        rows.append(_row(cell))
        mine = paper[(paper["model"].str.lower() == cell.model.lower()) & (paper["cell"] == cell.name)]
        rows += [_paper_row(row) for row in mine.to_dict("records")]
    table = pd.DataFrame(rows).fillna("")
    return table[sorted(table.columns, key=FAILED.__eq__)]


def _row(cell: Cell) -> dict[str, str]:
    cells = {"method": cell.title}
    if cell.record is None and not cell.original:
        return {**cells, FAILED: cell.reasons["record"]}
    point = cell.speed["found"]["points"][0] if cell.speed else None
    for column, what in (("prefill x", "prefill"), ("decoding x", "decode")):
        cells[column] = "1" if cell.original else ratio(point[what]) if point else ""
    cells["FLOPs"] = _short(cell.flops["total"]["prefill"], UNITS) if cell.flops else ""
    cells["weights"] = _short(cell.record.sizes["bytes"], BINARY) if cell.record else ""
    cells |= _accuracies(cell)
    metrics = cell.record.metrics if cell.record else {}
    cells["perplexity"] = f"{metrics['perplexity'].value:.2f}" if "perplexity" in metrics else ""
    if "delta_nll" in metrics:
        same = f" {SAME}" if cell.record and table_formats.detectable([cell.record]) is False else ""
        change = metrics["delta_nll"]
        cells["change of NLL"] = table_formats.with_interval(change.value, change.interval, "+.4f") + same
    return cells


def _short(count: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next(((size, unit) for size, unit in units if count >= size), (1, ""))
    return f"{count / size:.1f} {unit}"


def _accuracies(cell: Cell) -> dict[str, str]:
    """In percent, and their mean with its change."""
    if cell.tasks is None:
        return {}
    side = "before" if cell.original else "after"
    found = {name: f"{100 * task[side]['value']:.1f}" for name, task in cell.tasks["tasks"].items()}
    average = cell.tasks["average"]
    if average:
        found["average"] = f"{100 * average[side]['value']:.1f}"
        if not cell.original:
            low, high = (100 * end for end in average["delta"]["interval"])
            same = f" {SAME}" if low <= 0 <= high else ""
            found["average"] += f", {100 * average['delta']['value']:+.1f} [{low:+.1f}, {high:+.1f}]{same}"
    return found


def _paper_row(row: Mapping[str, Any]) -> dict[str, str]:
    tasks = {
        key: f"{value:.1f}"
        for key, value in row.items()
        if key not in ("model", "cell", "speedup", "teraflops", "gibibytes")
    }
    speedup = "1" if row["cell"] == ORIGINAL else f"{row['speedup']:.2f}"
    ours = {"prefill x": speedup, "FLOPs": f"{row['teraflops']:.1f} T", "weights": f"{row['gibibytes']:.1f} GiB"}
    return {"method": IN_PAPER, **ours, **tasks}


def notes(found: Sequence[Cell]) -> list[str]:
    """How it was timed, on a machine that was busy or not, and what of a finished row is missing, and why."""
    timed = {cell.title: cell.speed["found"] for cell in found if cell.speed}
    lines = []
    if timed:
        setting = next(iter(timed.values()))["setting"]
        threads = setting["threads"]
        lines.append(
            f"Timed in {setting['dtype']} on {setting['device']}, threads: {threads}; a prompt of "
            f"{setting['prompts'][0]}, {setting['batches'][0]} at once."
        )
    busy = [title for title, speed in timed.items() if speed["machine"]["busy"]]
    if busy:
        lines.append(f"**BUSY MACHINE while these were timed: {', '.join(busy)}.**")
    for cell in found:
        if cell.record is not None:
            lines += [f"{cell.title}, {part}: {reason}" for part, reason in cell.reasons.items()]
    return lines


def _latex(model: str, table: pd.DataFrame) -> str:
    return table_formats.latex(model, "trimming x slimming", Cells.of(table.to_dict("records")))


def write(folder: Path) -> None:
    """Read the folder, write the table in four formats, failures beside the records, and page and plots."""
    values = _json(folder / "grid.json")
    paper = pd.read_csv(HERE / "paper_table3.csv")
    found = cells(folder, values)
    tables = {model: [cell for cell in found if cell.model == model] for model in values["models"]}
    frames = {model: frame(of_model, paper) for model, of_model in tables.items()}
    _failures(folder, found, values)
    parts = ["# Trimming x slimming"]
    for model, table in frames.items():
        parts += [f"## {model}", table.to_markdown(index=False, disable_numparse=True), *notes(tables[model])]
    texts = {
        "csv": pd.concat([table.assign(model=model) for model, table in frames.items()]).fillna("").to_csv(index=False),
        "tex": "\n\n".join([table_formats.PACKAGES_NEEDED, *(_latex(m, table) for m, table in frames.items())]) + "\n",
    }
    for kind, text in texts.items():
        (folder / f"{STEM}.{kind}").write_text(text, encoding="utf-8")
    write_json(folder / f"{STEM}.json", {"cells": [_numbers(cell) for cell in found]})
    if any(cell.record for cell in found):
        make_report([folder / "records"], folder, report_columns(), png=True)
    compared = [PAPERS] if any(IN_PAPER in set(table["method"]) for table in frames.values()) else []
    # Last, for it says that all is there.
    (folder / f"{STEM}.md").write_text("\n\n".join([*parts, MEANING, *compared]) + "\n", encoding="utf-8")


def _failures(folder: Path, found: Sequence[Cell], values: Mapping[str, Any]) -> None:
    """One for each cell without a record; those of cells that have one since go."""
    for name, cell in values["cells"].items():
        path = folder / "failures" / f"{name}.json"
        (row,) = (each for each in found if (each.model, each.name) == (cell["model"], cell["cell"]))
        if row.record is not None:
            path.unlink(missing_ok=True)
        else:
            Failure(
                name=name, model=cell["model"], recipe=cell["recipe"], reason=row.reasons["record"], written=now()
            ).save(path.parent)


def _without_turns(point: Mapping[str, Any]) -> dict[str, Any]:
    """Every turn is in the speed file."""
    timed = {what: {k: v for k, v in point[what].items() if k != "turns"} for what in ("prefill", "decode")}
    return {**point, **timed}


def _numbers(cell: Cell) -> dict[str, Any]:
    """What stands behind a row."""
    return {
        "model": cell.model,
        "cell": cell.name,
        "record": cell.record.name if cell.record else None,
        "sizes": cell.record.sizes if cell.record else None,
        "metrics": {k: m.model_dump() for k, m in cell.record.metrics.items()} if cell.record else None,
        "points": [_without_turns(point) for point in cell.speed["found"]["points"]] if cell.speed else None,
        "prefill_flops": cell.flops["total"]["prefill"] if cell.flops else None,
        "tasks": {"tasks": cell.tasks["tasks"], "average": cell.tasks["average"]} if cell.tasks else None,
        "missing": dict(cell.reasons),
    }


if __name__ == "__main__":
    set_up_logging(verbose=False)
    write(Path(sys.argv[1]))
