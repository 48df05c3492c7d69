"""FLOPs and sizes by component as Markdown, from their JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_compress.report import formats

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
MEANING = (
    "Two FLOPs a multiply-add; norms, activations and softmax are not counted. Prefill: every token attends to all, "
    "the full square and not its causal half, with a sliding window as well; the head on every token. Decode: a step "
    "of one token a sequence, the context holding that token; no more of it than the window where there is one; what "
    "latent attention expands again is counted. Share: of the prefill."
)
ESTIMATE = (
    "\\* An estimate: recurrent layers scan in other ways in other kernels, and where experts are skipped or replaced, "
    "the text decides how many run."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A row a component and one for all, what is counted, and torch's own count where it was asked for."""
    tokens, context, batch = report["tokens"], report["context"], report["batch"]
    title = f"### {report['model']}\n\nPrefill of {batch} x {tokens:,} tokens, a step at {context:,} of context."
    total = report["total"]
    shown = [each for each in report["components"] if any(each[key] for key in ("parameters", "bytes", "prefill"))]
    frame = pd.DataFrame([_row(each, total["prefill"]) for each in [*shown, {"name": "all", **total}]])
    parts = [title, formats.markdown(frame), MEANING]
    if any(each["estimate"] for each in shown):
        parts.append(ESTIMATE)
    if report["check"] is not None:
        parts.append(_agreement(report["check"]))
    return "\n\n".join(parts) + "\n"


def _row(each: Mapping[str, Any], prefill: int) -> dict[str, str]:
    return {
        "component": each["name"] + (" \\*" if each.get("estimate") else ""),
        "parameters": _short(each["parameters"]),
        "stored": _short(each["bytes"], BINARY),
        "touched by a token": _short(each["touched"]),
        "prefill FLOPs": _short(each["prefill"]),
        "share": f"{each['prefill'] / max(prefill, 1):.1%}",
        "decode FLOPs": _short(each["decode"]),
    }


def _short(count: int, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """A count in the largest unit that it reaches."""
    for size, unit in units:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count}"


def _agreement(found: Sequence[Mapping[str, Any]]) -> str:
    """What torch counted, and a verdict."""
    rows = [
        {
            "component": each["component"],
            "phase": each["phase"],
            "ours": f"{each['analytic']:,}",
            "torch": f"{each['counted']:,}",
            "difference": f"{each['difference']:.3%}" if each["compared"] else "not compared",
        }
        for each in found
    ]
    apart = [f"{each['component']} ({each['phase']})" for each in found if not each["agrees"]]
    verdict = f"differs from ours: {', '.join(apart)}." if apart else "agrees to 0.1 % wherever it is comparable."
    verdict = f"Torch's own counter {verdict} Its decode step comes right behind the prefill."
    return f"{verdict}\n\n" + formats.markdown(pd.DataFrame(rows))
