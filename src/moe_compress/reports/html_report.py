"""The report: records and what was left beside them in, one HTML page and plots of its fronts out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.reports import charts, companions, learning_curve
from moe_compress.reports.companions import LATENCY, Columns, CompanionResult, JoinedColumns
from moe_compress.reports.fronts import write_front
from moe_compress.reports.page import Contents, Gallery, Section, render
from moe_compress.reports.reading import Places, failures_of, gather, sibling_folders
from moe_compress.reports.record import Record, write_whole
from moe_compress.reports.table import Table, make_tables, stems
from moe_compress.utils.files import require_writable
from moe_compress.utils.logging import log

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written, and a sentence for each file that was skipped."""

    files: list[Path]
    skipped: list[str]


def make_report(records: Places, out: str | Path, columns: Mapping[str, Columns], png: bool = False) -> Report:
    """Write the page and the plots of records (files, or folders of them) and of what other commands left beside them.

    columns: by the folder beside the records whose files add them; png: whether plots are drawn as PNG as well. Files
    that are none of ours, or were changed, are named in a warning and skipped. ValueError without any record.
    """
    require_writable(Path(out) / "plots", f"out={out}")
    good, skipped = gather(records)
    places = sibling_folders(records)
    failures, wrong = failures_of(records)
    tables, skipped = make_tables(good, failures), skipped + wrong
    found: dict[str, list[CompanionResult]] = {}
    for folder, each in columns.items():
        read, wrong = companions.read_json(_files(places, f"{folder}/*.json"), each.read, folder)
        found[folder], skipped = [result for results in read for result in results], skipped + wrong
    galleries, wrong = _galleries(places)
    skipped += wrong
    watched = {gallery.title for gallery in galleries}
    galleries = [*(each for each in _losses(good) if each.title not in watched), *galleries]
    sections = [_section(table, places, columns, found) for table in tables]
    models = {table.title for table in tables}
    homeless = [failure for failure in failures if failure.model not in models]
    for sentence in skipped:
        log.warning("skipped: %s.", sentence)
    files = _plots(sections, Path(out) / "plots", png)
    page = write_whole(Path(out) / PAGE, render(Contents(sections, homeless, galleries, skipped)))
    return Report([page, *files], skipped)


def _section(
    table: Table, places: Sequence[Path], columns: Mapping[str, Columns], found: Mapping[str, Sequence[CompanionResult]]
) -> Section:
    """A table, the columns that belong to its rows, and its fronts."""
    from moe_compress.reports import pareto

    records = [record for row in table.rows for record in row]
    joined = {folder: each.join(found[folder], records) for folder, each in columns.items()}
    timed = next((joined[folder] for folder, each in columns.items() if each.cost == LATENCY), JoinedColumns({}, ""))
    folders = [place / "documents" for place in places]
    fronts = pareto.make_fronts(table.cells.column("recipe"), table.rows, folders, timed)
    return Section(table, fronts, table.failures, joined)


def _files(places: Sequence[Path], pattern: str) -> Iterator[Path]:
    return (path for place in places for path in sorted(place.glob(pattern)))


def _galleries(places: Sequence[Path]) -> tuple[list[Gallery], list[str]]:
    """Pictures of routing and of analyses, and sentences about files that are none."""
    routing, wrong = companions.read_json(
        _files(places, "routing/*.json"),
        lambda found: Gallery(f"Routing of {found['model']} beside {found['original']}", charts.of_routing(found)),
        "routing",
    )
    analyses, others = companions.read_json(
        _files(places, "analysis/*/analysis.json"),
        lambda found: Gallery(f"Experts of {found['model']}", charts.of_analysis(found)),
        "analysis",
    )
    trainings, strange = _trainings(places)
    return [*trainings, *analyses, *routing], [*wrong, *others, *strange]


def _trainings(places: Sequence[Path]) -> tuple[list[Gallery], list[str]]:
    """Curves of trainings that were watched, by training and protocol; sentences about files that are none."""
    read, wrong = companions.read_json(
        _files(places, "watch/*/*.json"),
        lambda found: ((found["model"], found["run"], found["protocol"]), found),
        "watch",
    )
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for key, found in read:
        groups.setdefault(key, []).append(found)
    galleries = []
    for (name, _, protocol), group in groups.items():
        title = f"Training of {name}" + f" ({protocol[:6]})" * (sum(key[0] == name for key in groups) > 1)
        galleries.append(Gallery(title, learning_curve.pictures(learning_curve.curves_of(group))))
    return [gallery for gallery in galleries if gallery.pictures], wrong


def _losses(records: Sequence[Record]) -> Iterator[Gallery]:
    """Losses of what was trained, by record."""
    for record in records:
        for stage in record.report:
            if "training" in stage:
                curves = learning_curve.curves_of_losses(stage["training"]["curve_steps"], stage["training"]["curve"])
                yield Gallery(f"Training of {record.name}", learning_curve.pictures(curves))


def _plots(sections: Sequence[Section], folder: Path, png: bool) -> list[Path]:
    files: list[Path] = []
    for stem, section in zip(stems([section.table for section in sections]), sections, strict=True):
        for front in section.fronts:
            files += write_front(folder / f"{stem}-{front.key}", section.table.title, front, png)
    return files
