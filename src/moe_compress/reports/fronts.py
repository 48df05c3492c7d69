"""A front as files: SVG, drawn as on the page, and PNG where that is asked for. This module knows nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_compress.reports import svg
from moe_compress.reports.record import write_whole
from moe_compress.reports.templates import template
from moe_compress.utils.text import printable

if TYPE_CHECKING:
    from moe_compress.reports.pareto import Front

TEMPLATE = "front.svg.j2"


def write_front(stem: Path, title: str, front: Front, png: bool = False) -> list[Path]:
    """Write a front as SVG, and as PNG if that is asked for, else leave none of an earlier front; returns the paths."""
    # XML has no way to write control characters, which a name may hold.
    drawn = printable(template(TEMPLATE).render(svg.picture(title, front)))
    files = [write_whole(stem.with_name(f"{stem.name}.svg"), drawn + "\n")]
    if not png:
        stem.with_name(f"{stem.name}.png").unlink(missing_ok=True)
        return files
    from moe_compress.reports import plots  # matplotlib: a second that only a PNG needs

    return [*files, *plots.front(stem, title, front)]
