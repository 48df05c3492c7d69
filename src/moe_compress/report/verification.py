"""A verification as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_compress.report import formats

UNASKED = "stock transformers reads no such layout, so there was nothing to compare; moe_compress runs it"


def as_markdown(found: Mapping[str, Any]) -> str:
    """The verdict, what was compared, and a row for every program."""
    verdict = "verified" if found["passed"] else "NOT VERIFIED: " + ("; ".join(found["problems"]) or UNASKED)
    parts = [f"### {found['model']}", f"{found['form']} checkpoint: {verdict}."]
    if found["error"] is not None:
        parts.append(
            f"Stock transformers, without this package, made a {found['stock_class']} of it; its logits "
            f"differ by {found['error']:.1e} of their size (at most {found['tolerance']:.0e})."
        )
    rows = [{"program": c["client"], "loads it": "yes" if c["loads"] else "no", "": c["why"]} for c in found["clients"]]
    return "\n\n".join([*parts, formats.markdown(pd.DataFrame(rows))]) + "\n"
