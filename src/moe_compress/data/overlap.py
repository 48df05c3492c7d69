"""Text that would be calibrated on and evaluated on: refused, unless it is allowed."""

from __future__ import annotations

from pathlib import Path

from moe_compress.data.documents import DataSpec, parts
from moe_compress.data.files import content_hash
from moe_compress.data.windows import Windows

ALLOW = "use another text, or allow_overlap=true if that is meant"


def refuse_same_files(calibration: DataSpec, heldout: DataSpec) -> None:
    """Raise ValueError if a file serves both, under one name or two."""
    evaluated = {_content(part): part.source for part in parts(heldout)}
    for part in parts(calibration):
        content = _content(part)
        if content and content in evaluated:
            twice = "" if part.source == evaluated[content] else f" (the same content as {evaluated[content]})"
            raise ValueError(f"{part.source}{twice} is both data= and eval_data=: {ALLOW}.")


def _content(part: DataSpec) -> str:
    path = Path(part.source)
    return content_hash(path) if part.source != "zoo" and path.is_file() else ""


def refuse_same_documents(calibration: Windows, heldout: Windows) -> None:
    """Raise ValueError if documents of the calibration windows are in those of the evaluation as well."""
    same = calibration.digests & heldout.digests
    if same:
        count = f"{len(same)} of the {len(calibration.digests)} documents"
        raise ValueError(f"{count} of the calibration text are in the evaluation text as well: {ALLOW}.")
