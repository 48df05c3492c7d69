"""Task accuracy as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_compress.report import formats
from moe_compress.report.table import SAME

LEAST_P = 0.05
MEANING = (
    "Accuracy with Wilson's 95 % interval; acc_norm: likelihoods are divided by the length of the choice. Chance: of "
    "blind guesses. Change: paired by document, bootstrapped over documents. Lost: right in the original alone; "
    "gained: in the model alone; p: McNemar's exact test of the two. Average: the plain mean of the tasks."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A row for each task, their average, and what the columns mean."""
    rows = [_row(name, found) for name, found in report["tasks"].items()]
    if report["average"]:
        rows.append(_row("average", report["average"]))
    frame = pd.DataFrame(rows).fillna("")
    beside = f" beside {report['original']}" if "model" in rows[0] else ""
    table = formats.markdown(frame)
    return "\n\n".join([f"### {report['model']}{beside}", _settings(report["settings"]), table, MEANING]) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    asked = f"the first {settings['limit']} documents" if settings["limit"] else "all documents"
    how = f"{settings['dtype']} on {settings['device']}, {settings['attn']} attention"
    return f"{settings['fewshot']}-shot, {asked}, {how}, lm_eval {settings['lm_eval']}"


def _row(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    row = {"task": name}
    if "metric" in found:
        chance = "" if found["chance"] is None else f"{found['chance']:.3f}"
        row |= {"metric": found["metric"], "documents": f"{found['documents']:,}", "chance": chance}
    row["original"] = _metric(found["before"])
    if "after" in found:
        row |= {"model": _metric(found["after"]), "change": _change(found["delta"], found.get("p", 0.0))}
    if "lost" in found:
        row |= {"lost": f"{found['lost']}", "gained": f"{found['gained']}", "p": f"{found['p']:.2g}"}
    return row


def _metric(found: Mapping[str, Any], sign: str = "") -> str:
    ends = found["interval"]
    return f"{found['value']:{sign}.3f}" + (f" [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]" if ends else "")


def _change(found: Mapping[str, Any], p: float) -> str:
    """Detectable only where interval and test agree that it is: of few documents the interval alone says too much."""
    ends = found["interval"]
    nothing = ends is not None and (ends[0] <= 0 <= ends[1] or p > LEAST_P)
    return _metric(found, "+") + (f", {SAME}" if nothing else "")
