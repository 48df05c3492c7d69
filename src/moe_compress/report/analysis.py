"""Analyses of layers as Markdown, from their JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

SHOWN = 4
Layer = Mapping[str, Any]


def as_markdown(title: str, layers: Sequence[Layer]) -> str:
    """A row a layer, and below what the columns mean and why some are empty."""
    frame = pd.DataFrame([_row(layer) for layer in layers])
    table = frame.to_markdown(index=False, disable_numparse=True)
    first = layers[0]
    how = (
        f"{first['tokens']:,} tokens, domains: {', '.join(first['domains'])}. Utilization: share of tokens that use an "
        "expert, with its 95 % interval. Similar pairs: those whose outputs on the same tokens have a mean cosine "
        f"above {first['threshold']:g}, of all pairs; weights: the closest pair after aligning neurons."
    )
    reasons = dict.fromkeys(layer["warning"] for layer in layers if layer["warning"])
    return "\n\n".join([f"### {title}", table, how, *(f"No verdicts: {reason}" for reason in reasons)]) + "\n"


def _row(layer: Layer) -> dict[str, str]:
    order = sorted(range(layer["num_experts"]), key=layer["utilization"].__getitem__)
    places = {"min": order[0], "median": order[len(order) // 2], "max": order[-1]}
    pairs = layer["num_experts"] * (layer["num_experts"] - 1) // 2
    return {
        "layer": str(layer["layer_idx"]),
        "experts": f"{layer['num_experts']} ({layer['top_k']} a token)",
        **{f"utilization {name}": _share(layer, expert) for name, expert in places.items()},
        "CV": f"{layer['coefficient_of_variation']:.2f}",
        "similar pairs": f"{len(layer['merge_candidates'])} of {pairs}",
        "weights": _closest(layer),
        "type": layer["moe_type"],
        "specialists": _specialists(layer),
        "generalists": _listed(layer["generalist_experts"]),
        "prune": _listed(layer["prune_candidates"]),
        "merge": _listed("+".join(map(str, group)) for group in layer["mergeable_groups"]),
        "recommended": str(layer["recommended_target"]),
    }


def _share(layer: Layer, expert: int) -> str:
    low, high = layer["utilization_interval"][expert]
    return f"{layer['utilization'][expert]:.3f} [{low:.3f}, {high:.3f}]"


def _closest(layer: Layer) -> str:
    matrix = layer["similarity"]["weights"]["matrix"]
    found = [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
    return f"{max(found):.2f}" if found else "-"


def _specialists(layer: Layer) -> str:
    by_domain: dict[str, list[str]] = {}
    for found in sorted(layer["preferences"], key=lambda found: -found["ratio"]):
        if found["expert"] in layer["specialist_experts"] and found["low"] > 1:
            by_domain.setdefault(found["domain"], []).append(f"{found['expert']} ({found['ratio']:.1f}x)")
    return "; ".join(f"{domain}: {_listed(experts)}" for domain, experts in by_domain.items()) or "-"


def _listed(values: Any) -> str:
    """The first few, and how many more there are."""
    words = [str(value) for value in values]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more or "-"
