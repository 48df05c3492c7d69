"""Tables from records: one per protocol and original model, the original as the first row. Missing stays missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compress.reports import table_formats
from moe_compress.reports.reading import Places, failures_of, gather
from moe_compress.reports.record import Failure, Record, write_whole
from moe_compress.reports.table_formats import Cells

if TYPE_CHECKING:
    import pandas as pd

BYTES = 2**20
SAME = "no detectable difference"
# Column -> what of the record's sizes, its unit and how that is written.
SIZES = {
    "parameters": ("parameters", 1e6, " M"),
    "MiB": ("bytes", BYTES, ""),
    "touched per token": ("touched", 1e6, " M"),
    "MFLOPs per token": ("flops_per_token", 1e6, ""),
}
# Column -> metric and how its numbers are written.
METRICS = {
    "perplexity": ("perplexity", ".2f"),
    "change of NLL": ("delta_nll", "+.4f"),
    "KL": ("kl", ".4f"),
    "same top token": ("top1_agreement", ".3f"),
    "same experts, free-running": ("routing_overlap", ".3f"),
    "tasks right": ("task_accuracy", ".3f"),
}
SECONDS, PEAK = "calibration + writing s", "peak MiB"
TOKENS, PROCESSOR = "recovered on tokens", "recovery processor s"


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: same original model, same protocol.

    cells: of all rows, as text; rows: the records behind each, one a seed; failures: runs of this model that did not
    finish, which have no protocol.
    """

    title: str
    protocol: dict[str, Any]
    cells: Cells
    rows: Sequence[Sequence[Record]]
    failures: Sequence[Failure] = ()

    @property
    def frame(self) -> pd.DataFrame:
        """The cells for pandas."""
        return self.cells.frame()

    @property
    def whole(self) -> Cells:
        """The cells, and a row for each run that did not finish."""
        lost = [
            {"recipe": each.recipe, "form": f"did not finish: {' '.join(each.reason.split())}"}
            for each in self.failures
        ]
        return Cells.of([*self.cells.records(), *lost])

    @property
    def turned(self) -> Cells:
        """Rows as columns, without what none of them has; last what was measured on each of several texts."""
        names = dict.fromkeys(name for row in self.rows for record in row for name in record.metrics)
        found = self.cells.records()
        for column, key in (("perplexity", "perplexity_"), ("change of NLL", "delta_nll_")):
            form = METRICS[column][1]
            for name in (name for name in names if name.startswith(key)):
                for cells, row in zip(found, self.rows, strict=True):
                    end = f" {SAME}" if table_formats.detectable(row, name) is False else ""
                    cells[f"{column}, {name.removeprefix(key)}"] = _cell(row, name, form) + end
        return Cells.of(found).filled().turned()

    def markdown(self, turned: bool = False) -> str:
        """Title, protocol in a line, and the table; `turned`: rows as columns, without what none of them has."""
        how = f"{self.how()}, protocol `{self.protocol['id']}`"
        cells = table_formats.markdown(self.turned if turned else self.whole)
        return f"### {table_formats.line(self.title)}\n\n{how}\n\n{cells}\n"

    def how(self) -> str:
        """The text, and the arithmetic it was run in."""
        text = self.protocol["text"]
        return (
            f"{text['tokens']:,} tokens of {text['source']} ({text['windows']} windows of {text['length']}), "
            f"{self.protocol['dtype']} on {self.protocol['device']}"
        )

    def latex(self) -> str:
        """The same cells as a LaTeX longtable."""
        return table_formats.latex(self.title, f"{self.how()}, protocol {self.protocol['id']}", self.whole)

    def to_json(self) -> dict[str, Any]:
        """Model, protocol, and the numbers of every row."""
        rows = table_formats.numbers(self.cells.column("recipe"), self.rows)
        lost = [failure.model_dump() for failure in self.failures]
        base = self.rows[0][0].base
        return {"model": self.title, "base": base, "protocol": self.protocol, "rows": rows, "failures": lost}

    def csv(self) -> str:
        """The same cells as CSV."""
        return table_formats.as_csv(self.whole)


def read_tables(places: Places) -> tuple[list[Table], list[str]]:
    """Tables of records (or of folders of them) and of the failures beside them; a sentence for each broken file."""
    records, skipped = gather(places)
    failures, wrong = failures_of(places)
    return make_tables(records, failures), [*skipped, *wrong]


def make_tables(records: Iterable[Record], failures: Iterable[Failure] = ()) -> list[Table]:
    """Group records by original model and protocol; several seeds of one recipe become one row with their spread.

    failures: are rows of every table of their model, unless the run has a record since.
    """
    records = list(records)
    left = [failure for failure in failures if not failure.overtaken(records)]
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        key = record.model, str(record.base["fingerprint"]), str(record.protocol["id"])
        groups.setdefault(key, []).append(record)
    if not groups:
        raise ValueError("there are no records to make a table of: run a recipe first.")
    rows = {key: sorted(one_row_each(group), key=_order) for key, group in sorted(groups.items())}
    return [
        Table(key[0], found[0][0].protocol, _cells(found), found, [each for each in left if each.model == key[0]])
        for key, found in rows.items()
    ]


def _cells(rows: Sequence[Sequence[Record]]) -> Cells:
    named = [_row_name(row[0]) for row in rows]
    names = [
        f"{name} [{_text_of(row[0])}]" if named.count(name) > 1 else name for name, row in zip(named, rows, strict=True)
    ]
    return Cells.of([_row(name, found) for name, found in zip(names, rows, strict=True)])


def one_row_each(records: Sequence[Record]) -> list[list[Record]]:
    """Records that differ in nothing but the seed, together; of several runs with one seed, the latest."""
    rows: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda record: record.written):
        stages = [{k: v for k, v in stage["parameters"].items() if k != "seed"} for stage in record.recipe]
        methods = [stage["method"] for stage in record.recipe]
        plain_name = f"{record.name} {record.fingerprint}" if not record.recipe and record.form != "original" else ""
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
    found = [record.metrics["perplexity"].value for record in records if "perplexity" in record.metrics]
    perplexity = sum(found) / len(found) if found else math.inf
    return (records[0].form != "original", -records[0].sizes["parameters"], perplexity)


def _row_name(record: Record) -> str:
    """The recipe as a sentence, without what is at its default; seeds of one recipe share a row."""
    if record.form == "original":
        return "original"
    if not record.recipe:
        return record.name
    return sentence_of(record.recipe)


def sentence_of(stages: Sequence[dict[str, Any]]) -> str:
    """Stages in the words that they were asked for with, their seeds left out."""
    return " + ".join(_sentence(stage) for stage in stages)


def _sentence(stage: dict[str, Any]) -> str:
    if stage["method"] == "apply":
        return f"apply: {stage['given']['plan']} ({stage['given']['edits']})"
    given = {k: v for k, v in stage["given"].items() if k != "seed"}
    return " ".join([stage["method"], *(f"{key}={value}" for key, value in given.items())])


def _row(name: str, records: Sequence[Record]) -> dict[str, str]:
    first = records[0]
    cells = {"recipe": name + (f" ({len(records)} seeds)" if len(records) > 1 else ""), "form": first.form}
    for column, (key, unit, suffix) in SIZES.items():
        cells[column] = f"{first.sizes[key] / unit:,.2f}{suffix}" if key in first.sizes else ""
    cells |= {column: _cell(records, key, form) for column, (key, form) in METRICS.items()}
    if table_formats.detectable(records) is False:
        cells["change of NLL"] += f" {SAME}"
    forms = {SECONDS: ".1f", PEAK: ",.0f", TOKENS: ",.0f", PROCESSOR: ".1f"}
    return cells | {column: f"{value:{forms[column]}}" for column, value in _cost(first).items()}


def _cost(record: Record) -> dict[str, float]:
    """Seconds and MiB that a compression took, and a recovery; nothing for a model that was only measured."""
    cost = record.cost
    if not cost:
        return {}
    found = {SECONDS: cost["calibration_seconds"] + cost["surgery_seconds"], PEAK: cost["peak_bytes"] / BYTES}
    recovered = [stage["recovery"] for stage in record.report if "recovery" in stage]
    if recovered:
        found[TOKENS] = sum(stage["tokens"] for stage in recovered)
        found[PROCESSOR] = sum(stage["processor_seconds"] for stage in recovered)
    return found


def row_numbers(records: Sequence[Record]) -> dict[str, float]:
    """What the cells of a row say, as numbers by column; what is missing has none."""
    sizes = {column: records[0].sizes[key] for column, (key, *_) in SIZES.items() if key in records[0].sizes}
    found = {column: _values(records, key) for column, (key, _) in METRICS.items()}
    means = {column: sum(values) / len(values) for column, values in found.items() if values}
    return sizes | means | _cost(records[0])


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [record.metrics[name].value for record in records if name in record.metrics]


def _cell(records: Sequence[Record], name: str, form: str) -> str:
    """value [low, high] of one record; mean and smallest to largest of several seeds."""
    values = _values(records, name)
    if len(values) > 1:
        return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    found = [record.metrics[name] for record in records if name in record.metrics]
    return table_formats.with_interval(found[0].value, found[0].interval, form) if found else ""


def stems(tables: Sequence[Table]) -> list[str]:
    """A file name for each: model and protocol; numbered where two models have one name."""
    found: list[str] = []
    taken: dict[str, int] = {}
    for table in tables:
        stem = re.sub(r"[^\w.-]+", "-", f"{table.title}-{table.protocol['id'][:6]}").lstrip(".-")
        taken[stem] = taken.get(stem, 0) + 1
        found.append(f"{stem}-{taken[stem]}" if taken[stem] > 1 else stem)
    return found


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """tables.md, tables.tex and tables.json with all of them, and one CSV each."""
    texts = {
        "tables.md": "\n".join(table.markdown() for table in tables),
        "tables.tex": "\n\n".join([table_formats.PACKAGES_NEEDED, *(table.latex() for table in tables)]) + "\n",
        "tables.json": json.dumps([table.to_json() for table in tables], indent=1) + "\n",
    }
    texts |= {f"{stem}.csv": table.csv() for stem, table in zip(stems(tables), tables, strict=True)}
    return [write_whole(folder / name, text) for name, text in texts.items()]
