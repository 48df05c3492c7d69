"""The report: records and what was left beside them in, one HTML page and plots of its fronts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compress.reports import charts, companions, pareto, plots
from moe_compress.reports.page import Contents, Gallery, Section, render
from moe_compress.reports.reading import Places, failures_beside, gather
from moe_compress.reports.reading import sibling_folders as places_beside
from moe_compress.reports.record import write_whole
from moe_compress.reports.table import make_tables, stems
from moe_compress.utils.files import require_writable
from moe_compress.utils.logging import log

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written, and a sentence for each file that was skipped."""

    files: list[Path]
    skipped: list[str]


def report(records: Places = "runs/records", out: str | Path = "runs") -> list[Path]:
    """Write out/report.html and out/plots/; returns their paths. See `make_report`."""
    return make_report(records, out).files


def make_report(records: Places = "runs/records", out: str | Path = "runs") -> Report:
    """Write the page and the plots of records (files, or folders of them) and of what other commands left beside them.

    Files that are none of ours, or were changed, are named in a warning and skipped. ValueError without any record.
    """
    require_writable(Path(out) / "plots", f"out={out}")
    good, skipped = gather(records)
    places = places_beside(records)
    failures, wrong = failures_beside(records)
    tables, skipped = make_tables(good, failures), skipped + wrong
    speeds, wrong = companions.read_json(_files(places, "speed/*.json"), companions.timed, "speed")
    skipped = skipped + wrong
    galleries, wrong = _galleries(places)
    skipped += wrong
    answers, wrong = companions.read_json(_files(places, "tasks/*.json"), companions.asked, "tasks")
    skipped += wrong
    timings, answered = ([each for found in files for each in found] for files in (speeds, answers))
    folders = [place / "documents" for place in places]
    sections = []
    for table in tables:
        of_table = [record for row in table.rows for record in row]
        timed, right = companions.speedups(timings, of_table), companions.accuracies(answered, of_table)
        fronts = pareto.make_fronts(list(table.frame["recipe"]), table.rows, folders, timed)
        sections.append(Section(table, fronts, table.failures, {"speed": timed, "tasks": right}))
    models = {table.title for table in tables}
    homeless = [failure for failure in failures if failure.model not in models]
    for sentence in skipped:
        log.warning("skipped: %s.", sentence)
    files = _plots(sections, Path(out) / "plots")
    page = write_whole(Path(out) / PAGE, render(Contents(sections, homeless, galleries, skipped)))
    return Report([page, *files], skipped)


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
    return [*analyses, *routing], [*wrong, *others]


def _plots(sections: Sequence[Section], folder: Path) -> list[Path]:
    files: list[Path] = []
    for stem, section in zip(stems([section.table for section in sections]), sections, strict=True):
        for front in section.fronts:
            files += plots.front(folder / f"{stem}-{front.key}", section.table.title, front)
    return files
