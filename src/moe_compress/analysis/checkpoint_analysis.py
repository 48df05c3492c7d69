"""Analyses of layers as Markdown, from their JSON. This module knows nothing of ours."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.analysis.layer_analysis import SIMILAR, LayerAnalysis, analyse
from moe_compress.calibration.collect import calibration_for, observed, unobserved
from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.data.prompts import prompt_windows, read_prompts
from moe_compress.data.windows import parse_mix
from moe_compress.edits.apply import refuse_if_uneditable
from moe_compress.reports import table_formats
from moe_compress.reports.table_formats import Cells
from moe_compress.run.context import Run, text_spec
from moe_compress.run.progress import progress_bar
from moe_compress.utils.files import atomic_write

SHOWN = 4
Layer = Mapping[str, Any]


def as_markdown(title: str, layers: Sequence[Layer]) -> str:
    """A row a layer, and below what the columns mean and why some are empty."""
    table = table_formats.markdown(Cells.of([_row(layer) for layer in layers]))
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


JSON = "analysis.json"
# What BlockInfluence calls a curve -> what a reader does.
CURVES = {
    "block": "whole layer",
    "moe": "MoE block, with its residual",
    "attention": "attention, with its residual",
    "moe_inner": "MoE block alone",
    "attention_inner": "attention alone",
}


@dataclass(frozen=True)
class ModelAnalysis:
    """The layers of a model, how each turns the stream (by layer, `CURVES`), and the files that were written."""

    model: str
    text: Mapping[str, Any]
    layers: Sequence[LayerAnalysis]
    streams: Mapping[int, Mapping[str, float]]
    files: Sequence[Path] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        layers = [layer.to_json() for layer in self.layers]
        return {"model": self.model, "text": dict(self.text), "layers": layers, "streams": self.curves}

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """1 - cosine by layer, for every part of a layer that was seen."""
        return {
            title: by_layer
            for name, title in CURVES.items()
            if (by_layer := {i: turned[name] for i, turned in self.streams.items() if math.isfinite(turned[name])})
        }

    def markdown(self) -> str:
        """A table with a row a layer."""
        return as_markdown(self.model, [layer.to_json() for layer in self.layers])


def analyse_checkpoint(run: Run, layers: str = "", prompts: str = "", threshold: float = SIMILAR) -> ModelAnalysis:
    """Analyse the MoE layers `layers` ("3,7"; empty: all) of the run's model; no forward if it is calibrated already.

    prompts: a file of prompts, to be used instead of the calibration text.
    """
    checkpoint = resolve_model(run.options.model, run.options.revision)
    refuse_if_uneditable(checkpoint.config)
    wanted = _wanted(layers, [layer.shape.layer for layer in unobserved(checkpoint, with_weights=False).layers])
    if prompts:
        _use_prompts(Path(prompts), checkpoint, run)
    calibration = calibration_for(checkpoint, run, output_samples=True)
    seen = observed(checkpoint, calibration, parse_mix(run.options.mix, calibration.domains))
    found = []
    with progress_bar("analysing") as progress:
        for layer in seen.layers:
            index = layer.shape.layer
            if index in wanted:
                sums = calibration.layers[index]
                found.append(analyse(layer, sums["count"], sums["tokens"], threshold))
                progress(len(found), len(wanted))
    return ModelAnalysis(Path(checkpoint.name).name, calibration.description, found, seen.block_influence)


def _use_prompts(path: Path, checkpoint: Checkpoint, run: Run) -> None:
    """Let the run's calibration text be the prompts."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.text_config.vocab_size)
    run.options = run.options.model_copy(update={"data": path.name})
    run.cut[text_spec(run.options, "calibration")] = prompt_windows(read_prompts(path), tokenizer, path.name)


def _wanted(words: str, known: list[int]) -> list[int]:
    try:
        wanted = [int(word) for word in words.split(",")] if words else known
    except ValueError as error:
        raise ValueError(f"layers={words}: numbers of layers are needed, such as layers=3,7.") from error
    wrong = [index for index in wanted if index not in known]
    if wrong:
        raise ValueError(f"layers={words}: layer {wrong[0]} has no experts; MoE layers: {', '.join(map(str, known))}.")
    return wanted


def write_analysis(found: ModelAnalysis, folder: Path) -> ModelAnalysis:
    """analysis.json and four pictures, each as PNG and SVG; returns the analysis with the paths of its files."""
    from moe_compress.reports import plots

    numbers = [layer.layer_idx for layer in found.layers]
    atomic_write(folder / JSON, json.dumps(found.to_json(), ensure_ascii=False).encode())
    files = [
        folder / JSON,
        *plots.utilization(folder / "utilization", numbers, [layer.utilization for layer in found.layers]),
        *plots.similarity(
            folder / "similarity", numbers, [layer.similarity["outputs"].matrix for layer in found.layers]
        ),
        *plots.scores(folder / "reap", numbers, [layer.reap for layer in found.layers], "REAP score"),
        *plots.turns(folder / "turns", found.curves),
    ]
    return dataclasses.replace(found, files=files)
