"""Tables as LaTeX and as JSON: cells for the page, numbers for programs. This module knows nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from moe_compress.reports.record import Metric, Record

PACKAGES_NEEDED = r"% Needs \usepackage{booktabs,longtable}; wide tables fit on landscape pages in \scriptsize."
SPECIAL = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    return " ".join(text.translate(SPECIAL).split())


def line(text: str) -> str:
    """Text in one line."""
    return " ".join(text.split())


def markdown(frame: pd.DataFrame, index: bool = False) -> str:
    """A Markdown table of text cells, each in one line, none with a bar that would end it."""
    safe = frame.map(lambda cell: line(str(cell)).replace("|", "\\|"))
    if index:
        safe.columns = [line(str(name)).replace("|", "\\|") for name in safe.columns]
    return str(safe.to_markdown(index=index, disable_numparse=True))


def latex(title: str, how: str, frame: pd.DataFrame) -> str:
    """A booktabs longtable of the cells, without the columns that no row fills."""
    shown = frame.loc[:, (frame != "").any()]
    columns = r"p{0.3\linewidth}" + "".join("l" if name == "form" else "r" for name in shown.columns[1:])
    head = " & ".join(map(escaped, shown.columns)) + r" \\"
    return "\n".join(
        [
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{escaped(title)}: {escaped(how)}}} \\",
            *(r"\toprule", head, r"\midrule", r"\endfirsthead"),
            *(r"\toprule", head, r"\midrule", r"\endhead"),
            *(r"\bottomrule", r"\endfoot"),
            *(_row(cells) for cells in shown.itertuples(index=False)),
            r"\end{longtable}",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    line = " & ".join(map(escaped, cells)) + r" \\"
    # A bracket or a star would be taken for an argument of the row before it.
    return "{}" + line if line[0] in "[*" else line


def numbers(names: Sequence[str], rows: Sequence[Sequence[Record]]) -> list[dict[str, Any]]:
    """A JSON object a row: recipe, sizes, and a run for every seed, with values, intervals and units by metric.

    detectable: whether the change of NLL differs from none; None where that is not known.
    """
    return [
        {
            "recipe": name,
            "form": row[0].form,
            "sizes": {key: finite(value) for key, value in row[0].sizes.items()},
            "detectable": detectable(row),
            "runs": [_run(record) for record in row],
        }
        for name, row in zip(names, rows, strict=True)
    ]


def _run(record: Record) -> dict[str, Any]:
    return {
        "record": record.name,
        "seed": record.seed,
        "stages": [{"method": stage["method"], "given": stage.get("given", {})} for stage in record.recipe],
        "metrics": {name: _metric(metric) for name, metric in record.metrics.items()},
        "cost": record.cost,
        "written": record.written,
    }


def _metric(metric: Metric) -> dict[str, Any]:
    ends = metric.interval and [finite(end) for end in metric.interval]
    return {"value": finite(metric.value), "interval": ends, "unit": metric.unit}


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None


def detectable(records: Sequence[Record], name: str = "delta_nll") -> bool | None:
    """Whether a change (of NLL) differs from none: no, if every run's interval holds zero; None without intervals."""
    found = [record.metrics[name].interval for record in records if name in record.metrics]
    ends = [interval for interval in found if interval is not None]
    if not ends or len(ends) < len(records):
        return None
    return not all(low <= 0 <= high for low, high in ends)


def with_interval(metric: Metric, form: str = ".5g") -> str:
    """value [low, high]."""
    ends = f" [{metric.interval[0]:{form}}, {metric.interval[1]:{form}}]" if metric.interval else ""
    return f"{metric.value:{form}}{ends}"
