"""Analysing a checkpoint: every MoE layer from one calibration, as a table, a JSON file and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.analysis.layer import SIMILAR, LayerAnalysis, analyse
from moe_compress.checkpoint.load import load_tokenizer
from moe_compress.checkpoint.locate import open_model
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.measuring import calibration_for, observed, parse_mix, unobserved
from moe_compress.model.applying import refuse_if_uneditable
from moe_compress.report.analysis import as_markdown
from moe_compress.run import Run, text_spec
from moe_compress.runtime import atomic_write
from moe_compress.stream.prompts import prompt_windows, read_prompts
from moe_compress.terminal import progress_bar

JSON = "analysis.json"
# What StreamTurns calls a curve -> what a reader does.
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
    checkpoint = open_model(run.options.model, run.options.revision)
    refuse_if_uneditable(checkpoint.config)
    wanted = _wanted(layers, [layer.shape.layer for layer in unobserved(checkpoint, with_weights=False).layers])
    if prompts:
        _use_prompts(Path(prompts), checkpoint, run)
    calibration = calibration_for(checkpoint, run, probes=True)
    seen = observed(checkpoint, calibration, parse_mix(run.options.mix, calibration.domains))
    found = []
    with progress_bar("analysing") as progress:
        for layer in seen.layers:
            index = layer.shape.layer
            if index in wanted:
                sums = calibration.layers[index]
                found.append(analyse(layer, sums["count"], sums["tokens"], threshold))
                progress(len(found), len(wanted))
    return ModelAnalysis(Path(checkpoint.name).name, calibration.description, found, seen.streams)


def _use_prompts(path: Path, checkpoint: Checkpoint, run: Run) -> None:
    """Let the run's calibration text be the prompts."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
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
    from moe_compress.report import plots

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
