"""Numbers by layer as pictures: of a method's report, of routing, of an analysis. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compress.reports import svg

# Entries of a report that hold numbers by layer, as one, as a list (an expert each) or by name.
BY_LAYER = {
    "scores": "scores",
    "utilisation": "utilisation",
    "tokens": "calibration tokens",
    "similarity": "similarity",
    "sparsity_by_layer": "share of zeros",
    "bits": "bits",
    "allocated": "what each expert was given",
    "widths": "neurons left",
    "reconstruction": "of the reconstruction",
    "routing_change": "change of routing",
    "skipping": "of skipping",
}
# Numbers of an analysis by expert; of its similarities.
ANALYSED = {
    "utilization": "share of tokens",
    "reap": "REAP score",
    "routed_mass": "routed mass",
    "removal_error": "error without the expert",
}
FIDELITY = {"overlap": "overlap", "flips": "flips", "kl": "KL, nats"}
WAYS = {"free_running": "each on its own hidden states", "teacher_forced": "on the original's hidden states"}
Picture = dict[str, Any]


def of_report(entry: Mapping[str, Any]) -> tuple[list[Picture], dict[str, Any]]:
    """Pictures of a stage's report, and what is left of it to be shown as text."""
    pictures: list[Picture] = []
    rest = {}
    for key, value in entry.items():
        found = _pictures(BY_LAYER[key], value) if key in BY_LAYER and _is_by_layer(value) else []
        pictures += found
        if not found and value not in (None, {}, []):
            rest[key] = value
    return pictures, rest


def _is_by_layer(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(layer).isdigit() for layer in value)


def _pictures(title: str, layers: Mapping[str, Any]) -> list[Picture]:
    """One picture, or one for each name that the layers' values have."""
    values = list(layers.values())
    if all(map(_is_number, values)):
        return [svg.bars(title, layers)]
    if all(map(_is_row, values)):
        return [svg.heat(title, layers)]
    if not all(isinstance(value, dict) for value in values):
        return []
    names = dict.fromkeys(name for value in values for name in value)
    parts = ({layer: value[name] for layer, value in layers.items() if name in value} for name in names)
    named = zip(names, parts, strict=True)
    return [picture for name, part in named for picture in _pictures(f"{title}: {name}".replace("_", " "), part)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and all(each is None or _is_number(each) for each in value)


def of_routing(report: Mapping[str, Any]) -> list[Picture]:
    """Overlap, flips and KL by layer, with intervals, for both ways of asking."""
    pictures = []
    for way, how in WAYS.items():
        layers = report[way]["layers"]
        for key, name in FIDELITY.items():
            ends = {layer: found[key]["interval"] for layer, found in layers.items() if found[key]["interval"]}
            values = {layer: found[key]["value"] for layer, found in layers.items()}
            pictures.append(svg.bars(f"{name}, {how}", values, ends))
    return pictures


def of_analysis(analysis: Mapping[str, Any]) -> list[Picture]:
    """Use, scores and errors of every expert; how far layers turn the stream; how alike experts' outputs are."""
    layers = analysis["layers"]
    pictures = []
    for key, name in ANALYSED.items():
        rows = {str(layer["layer_idx"]): layer[key] for layer in layers if _is_row(layer.get(key))}
        pictures += [svg.heat(name, rows)] if rows else []
    for name, turned in analysis.get("streams", {}).items():
        pictures.append(svg.bars(f"1 - cosine of before and after: {name}", turned))
    for layer in layers:
        matrix = layer["similarity"]["outputs"]["matrix"]
        away = {str(i): [None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)}
        pictures.append(svg.heat(f"layer {layer['layer_idx']}: cosine of two experts' outputs", away))
    return pictures
