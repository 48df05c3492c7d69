"""Tables as Markdown, CSV, LaTeX and JSON: cells for people, numbers for programs. It knows nothing of ours."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_compress.reports.record import Metric, Record
from moe_compress.utils.text import printable

if TYPE_CHECKING:
    import pandas as pd

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


@dataclass(frozen=True)
class Cells:
    """A table of text: titles of columns, and rows of as many cells."""

    titles: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Cells:
        """Rows by title, in the order in which titles appear; what a row lacks is empty."""
        titles = list(dict.fromkeys(title for row in rows for title in row))
        return cls(titles, [[str(row.get(title, "")) for title in titles] for row in rows])

    def column(self, title: str) -> list[str]:
        """The cells under a title."""
        place = self.titles.index(title)
        return [row[place] for row in self.rows]

    def records(self) -> list[dict[str, str]]:
        """A mapping a row."""
        return [dict(zip(self.titles, row, strict=True)) for row in self.rows]

    def filled(self) -> Cells:
        """Without the columns that no row fills."""
        places = [place for place in range(len(self.titles)) if any(row[place] for row in self.rows)]
        return Cells([self.titles[p] for p in places], [[row[p] for p in places] for row in self.rows])

    def turned(self) -> Cells:
        """Rows as columns: the cells of the first column become the titles."""
        first, *others = [[title, *self.column(title)] for title in self.titles]
        return Cells(["", *first[1:]], others)

    def frame(self) -> pd.DataFrame:
        """The same for pandas."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=self.titles)


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    return " ".join(printable(text).translate(SPECIAL).split())


def line(text: str) -> str:
    """Text in one line."""
    return " ".join(printable(text).split())


def _inert(cell: str) -> str:
    """A cell that ends no row, and in which a viewer of Markdown sees no tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", line(cell).replace("|", "\\|"))


def _unasked(cell: str) -> str:
    """A cell that a spreadsheet takes for text: no formula, which may call programs."""
    text = line(cell)
    return f"'{text}" if re.match(r"[=@]|[+-](?![\d.\s])", text) else text


def markdown(cells: Cells) -> str:
    """A Markdown table of text cells, each in one line, none with a bar that would end it."""
    from tabulate import tabulate  # nothing but Markdown needs it

    titles, *rows = [list(map(_inert, row)) for row in (cells.titles, *cells.rows)]
    return tabulate(rows, titles, tablefmt="pipe", disable_numparse=True)


def as_csv(cells: Cells) -> str:
    """Comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([list(map(_unasked, row)) for row in (cells.titles, *cells.rows)])
    return out.getvalue()


def latex(title: str, how: str, cells: Cells) -> str:
    """A booktabs longtable of the cells, without the columns that no row fills."""
    shown = cells.filled()
    columns = r"p{0.3\linewidth}" + "".join("l" if name == "form" else "r" for name in shown.titles[1:])
    head = " & ".join(map(escaped, shown.titles)) + r" \\"
    return "\n".join(
        [
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{escaped(title)}: {escaped(how)}}} \\",
            *(r"\toprule", head, r"\midrule", r"\endfirsthead"),
            *(r"\toprule", head, r"\midrule", r"\endhead"),
            *(r"\bottomrule", r"\endfoot"),
            *map(_row, shown.rows),
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


def with_interval(value: float, interval: Sequence[float] | None, form: str = ".5g") -> str:
    """value [low, high]."""
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")
