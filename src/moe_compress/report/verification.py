"""A verification as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def as_markdown(found: Mapping[str, Any]) -> str:
    """The verdict, what was compared, and a row for every program."""
    verdict = "verified" if found["passed"] else "NOT VERIFIED: " + "; ".join(found["problems"])
    parts = [f"### {found['model']}", f"{found['form']} checkpoint: {verdict}."]
    if found["stock_class"] is None:
        parts.append("Stock transformers was not asked: see below.")
    else:
        parts.append(
            f"Stock transformers, in a process without this package, made a {found['stock_class']} of it; its logits "
            f"differ from moe_compress.load's by {found['error']:.1e} of their size (at most {found['tolerance']:.0e})."
        )
    rows = [{"program": c["client"], "loads it": "yes" if c["loads"] else "no", "": c["why"]} for c in found["clients"]]
    return "\n\n".join([*parts, str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))]) + "\n"
