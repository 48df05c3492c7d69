"""One table of harnesses: each is one function, from which its command, its Python function and its help come.

    @harness("speed", columns="moe_compress.evaluation.speed.columns")
    def speed(checkpoint, /, original=None, *, quick: bool = False, results: str = "runs") -> SpeedReport: ...

makes `moe-compress speed FOLDER quick=true` and `moe_compress.speed(folder, quick=True)`, keeps what the function
returns under results/speed/, and lets the page join columns from there. Signatures are read from the source
(utils/declarations.py), so that a mistyped word is answered before torch is imported.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compress.run.options import typed_words
from moe_compress.utils.declarations import Declaration, declarations, of_function
from moe_compress.utils.files import require_writable

if TYPE_CHECKING:
    from moe_compress.evaluation.saved_report import SavedReport
    from moe_compress.reports.companions import Columns

PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """A registered harness.

    results: the folder under results= that keeps its reports; columns: module with the columns that tables join from
    them (`reports.companions.Columns`), "" for none; options: of a run that it uses, where it takes any (**options).
    """

    name: str
    declaration: Declaration
    results: str
    columns: str
    options: tuple[str, ...] = ()

    def typed(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """Its own words in the types of their annotations, and options of a run as they are.

        Raises ValueError, with what would have worked, for words that it does not know or that are of another type.
        """
        return typed_words(self.name, self.declaration, words)

    def run(self, checkpoint: str | Path, **words: Any) -> SavedReport:
        """Measure, and keep what was found."""
        return self.declaration.load()(checkpoint, **words)

    def read_columns(self) -> Columns:
        """How tables read and join its reports."""
        return importlib.import_module(self.columns).COLUMNS


def harness(
    name: str, *, results: str = "", columns: str = "", options: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that measures a checkpoint and returns a `SavedReport`; see `Harness`.

    The function is given typed words; the one that is registered checks them, and keeps the report.
    """

    def register(measure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(measure)
        def measured(checkpoint: str | Path, /, *positional: Any, **words: Any) -> Any:
            one = HARNESSES[name]
            given = one.typed({**dict(zip(one.declaration.parameters, positional, strict=False)), **words})
            folder = Path(given.get("results") or "runs") / (results or name)
            require_writable(folder, f"results={folder.parent}")
            report = measure(checkpoint, **given)
            report.save(folder)
            return report

        found = _harness(of_function(measure, "harness", name, results=results, columns=columns, options=options))
        if HARNESSES.setdefault(name, found).declaration.module != found.declaration.module:
            raise ValueError(f"the harness {name!r} is registered twice.")
        return measured

    return register


def _harness(declaration: Declaration) -> Harness:
    name = declaration.positional[0]
    given = declaration.keywords
    return Harness(
        name=name,
        declaration=declaration,
        results=given.get("results") or name,
        columns=given.get("columns", ""),
        options=given.get("options", ()),
    )


# Every harness of the package, as its source declares it.
HARNESSES: dict[str, Harness] = {each.positional[0]: _harness(each) for each in declarations(PACKAGE, "harness")}


def report_columns() -> dict[str, Columns]:
    """What tables join, by the folder of reports that it comes from."""
    return {each.results: each.read_columns() for each in HARNESSES.values() if each.columns}
