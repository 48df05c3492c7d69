"""Tables from records: one per protocol and original model, the original as the first row. Missing stays missing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_compress.report.record import Record

BYTES = 2**20


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: same original model, same protocol."""

    title: str
    protocol: dict[str, Any]
    frame: pd.DataFrame

    def markdown(self, turned: bool = False) -> str:
        """Title, protocol in a line, and the table; `turned`: rows as columns, without what none of them has."""
        text = self.protocol["text"]
        how = (
            f"{text['tokens']:,} tokens of {text['source']} ({text['windows']} windows of {text['length']}), "
            f"{self.protocol['dtype']} on {self.protocol['device']}, protocol `{self.protocol['id']}`"
        )
        frame = self.frame.loc[:, (self.frame != "").any()].set_index("recipe").T if turned else self.frame
        cells = frame.to_markdown(index=turned, disable_numparse=True)
        return f"### {self.title}\n\n{how}\n\n{cells}\n"

    def csv(self) -> str:
        """The same cells as CSV."""
        out = io.StringIO()
        self.frame.to_csv(out, index=False)
        return out.getvalue()


def make_tables(records: Iterable[Record]) -> list[Table]:
    """Group records by original model and protocol; several seeds of one recipe become one row with their spread."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        key = record.model, str(record.base["fingerprint"]), str(record.protocol["id"])
        groups.setdefault(key, []).append(record)
    if not groups:
        raise ValueError("there are no records to make a table of: run a recipe first.")
    return [Table(model, group[0].protocol, _frame(group)) for (model, *_), group in sorted(groups.items())]


def _frame(records: Sequence[Record]) -> pd.DataFrame:
    rows = sorted(one_row_each(records), key=_order)
    named = [_row_name(row[0]) for row in rows]
    names = [
        f"{name} [{_text_of(row[0])}]" if named.count(name) > 1 else name for name, row in zip(named, rows, strict=True)
    ]
    return pd.DataFrame([_row(name, found) for name, found in zip(names, rows, strict=True)]).fillna("")


def one_row_each(records: Sequence[Record]) -> list[list[Record]]:
    """Records that differ in nothing but the seed, together; of several runs with one seed, the latest."""
    rows: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda record: record.written):
        stages = [{k: v for k, v in stage["parameters"].items() if k != "seed"} for stage in record.recipe]
        methods = [stage["method"] for stage in record.recipe]
        plain_name = record.name if not record.recipe and record.form != "original" else ""
        key = json.dumps([record.base, methods, stages, _calibrations(record), plain_name], sort_keys=True)
        rows.setdefault(key, {})[record.seed] = record
    return [list(row.values()) for row in rows.values()]


def _calibrations(record: Record) -> list[dict[str, Any]]:
    """The calibration settings of each stage, without what follows from the seed or the clock."""
    chance = ("seed", "hash", "fingerprint", "seconds", "peak_bytes", "tokens", "domains")
    measured = [stage.get("calibration") or {} for stage in record.report]
    return [{key: value for key, value in found.items() if key not in chance} for found in measured]


def _text_of(record: Record) -> str:
    """The calibration text in a few words, for rows that differ in it alone."""
    words = []
    for found in _calibrations(record):
        mix = "".join(f", {domain} {share:g}" for domain, share in found.get("mix", {}).items())
        words.append(f"{found.get('windows')} x {found.get('length')} of {found.get('source')}{mix}")
    return "; ".join(words)


def _order(records: Sequence[Record]) -> tuple[bool, float, float]:
    """The original first, then larger before smaller, then better before worse."""
    perplexity = sum(record.metrics["perplexity"].value for record in records) / len(records)
    return (records[0].form != "original", -records[0].sizes["parameters"], perplexity)


def _row_name(record: Record) -> str:
    """The recipe as a sentence, without what is at its default; seeds of one recipe share a row."""
    if record.form == "original":
        return "original"
    if not record.recipe:
        return record.name
    return " + ".join(_sentence(stage) for stage in record.recipe)


def _sentence(stage: dict[str, Any]) -> str:
    if stage["method"] == "apply":
        return f"apply: {stage['given']['plan']} ({stage['given']['edits']})"
    given = {k: v for k, v in stage["given"].items() if k != "seed"}
    return " ".join([stage["method"], *(f"{key}={value}" for key, value in given.items())])


def _row(name: str, records: Sequence[Record]) -> dict[str, str]:
    first = records[0]
    cells = {
        "recipe": name + (f" ({len(records)} seeds)" if len(records) > 1 else ""),
        "form": first.form,
        "parameters": f"{first.sizes['parameters'] / 1e6:,.2f} M",
        "MiB": f"{first.sizes['bytes'] / BYTES:,.2f}",
        "touched per token": f"{first.sizes['touched'] / 1e6:,.2f} M",
        "MFLOPs per token": f"{first.sizes['flops_per_token'] / 1e6:,.2f}",
        "perplexity": _cell(records, "perplexity", 2),
        "change of NLL": _cell(records, "delta_nll", 4, sign=True),
        "KL": _cell(records, "kl", 4),
        "same top token": _cell(records, "top1_agreement", 3),
        "same experts": _cell(records, "routing_overlap", 3),
        "tasks right": _cell(records, "task_accuracy", 3),
    }
    if first.cost:
        cells["calibration + writing s"] = f"{first.cost['calibration_seconds'] + first.cost['surgery_seconds']:.1f}"
        cells["peak MiB"] = f"{first.cost['peak_bytes'] / BYTES:,.0f}"
    return cells


def _cell(records: Sequence[Record], name: str, digits: int, sign: bool = False) -> str:
    """value [low, high] of one record; mean and smallest to largest of several seeds."""
    found = [record.metrics[name] for record in records if name in record.metrics]
    if not found:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    if len(found) == 1:
        interval = found[0].interval
        ends = f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""
        return f"{found[0].value:{form}}{ends}"
    values = [metric.value for metric in found]
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """tables.md with all of them, and one CSV each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "tables.md"]
    written[0].write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
    for table in tables:
        path = folder / f"{table.title}-{table.protocol['id'][:6]}.csv"
        path.write_text(table.csv(), encoding="utf-8")
        written.append(path)
    return written
