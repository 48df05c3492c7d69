"""Routing fidelity as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_compress.report import formats

HOW = {
    "teacher_forced": "Teacher-forced: each layer of both models on what enters the original's layer",
    "free_running": "Free-running: each model on its own hidden states",
}
MEANING = (
    "Overlap: experts that both use over all that either uses. Flips: tokens whose set of experts differs. KL: of the "
    "router's distribution over experts that are left, nats. Lost: what the original's router gave to experts that are "
    "gone. Shift: half the summed change of the experts' shares of all tokens. CV: standard deviation over mean of the "
    "tokens per expert; busiest: largest over mean; dead: experts without a token, before and after, and the "
    "share of documents below which such an expert is used, with 95 % confidence."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A table for each way of asking, and what the columns mean."""
    text = report["text"]
    title = f"### {report['model']} beside {report['original']}\n\n{text['tokens']:,} tokens of {text['source']}"
    parts = [title]
    for key, how in HOW.items():
        found = report[key]
        frame = pd.DataFrame([_row(layer, values) for layer, values in found["layers"].items()])
        together = ", ".join(f"{name} {_metric(value)}" for name, value in found["together"].items())
        parts.append(f"{how}. In all layers: {together}.")
        parts.append(formats.markdown(frame))
    return "\n\n".join([*parts, MEANING]) + "\n"


def _row(layer: Any, found: Mapping[str, Any]) -> dict[str, str]:
    before, after = found["before"], found["after"]
    return {
        "layer": f"{layer}" if int(layer) == found["source"] else f"{layer} (was {found['source']})",
        **{name: _metric(found[name]) for name in ("overlap", "flips", "kl", "lost")},
        "shift": f"{found['utilisation_shift']:.4f}",
        "CV": f"{before['cv']:.2f} -> {after['cv']:.2f}",
        "busiest": f"{before['busiest']:.2f} -> {after['busiest']:.2f}",
        "dead": f"{len(before['dead'])} -> {len(after['dead'])}" + _bound(after),
    }


def _bound(found: Mapping[str, Any]) -> str:
    return f" (below {found['dead_below']:.1%})" if found["dead"] else ""


def _metric(found: Mapping[str, Any]) -> str:
    ends = found["interval"]
    return f"{found['value']:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")
