"""How large the factors of each layer may be where one budget is shared out among all: found in a pass of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from moe_compress.calibration.gradients import OutputSquares
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.weights.layer_grams import GramCollector
from moe_compress.compression.weights.stage_matrices import factoring_of
from moe_compress.edits.factors import Part
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import LayerPass, Progress, walk_layers
from moe_compress.methods.factor_method import Shapes, Spectra
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.models.families import family_of
from moe_compress.models.moe import learned_view
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.utils.files import read_json, write_json

Sizes = Mapping[int, Mapping[Part, Size]]


def sizes_of_layers(
    stage: Stage,
    source: Checkpoint,
    run: Run,
    collector: GramCollector,
    scratch: Path,
    progress: Progress | None = None,
) -> Sizes:
    """Sizes by layer and projection; none where each layer has its own budget. A killed run has them already."""
    factoring, own = factoring_of(stage), stage.own_parameters
    if not factoring.shares_out(own):
        return {}
    file = scratch / "sizes.json"
    if not file.is_file():
        found = _Spectra(stage, source, collector)
        layers = run.layers(source)
        if stage.needs == "nothing":
            for index in range(source.num_layers):
                with layers.layer(index) as layer:
                    found.visit(index, layer)
        else:
            walk_layers(layers, run.windows("calibration", source), found.visit, progress=progress)
        sizes = factoring.share_out(found.spectra, found.shapes, collector.stored.itemsize, **own)
        write_json(file, {i: {part: asdict(size) for part, size in each.items()} for i, each in sizes.items()})
    return {int(i): {part: _size(size) for part, size in each.items()} for i, each in read_json(file).items()}


def squared_gradients(source: Checkpoint, run: Run, scratch: Path) -> Mapping[int, Mapping[Part, float]]:
    """Mean squares of the loss's gradients at what projections put out. A killed run has them already."""
    file = scratch / "gradients.json"
    if not file.is_file():
        observer = OutputSquares(family_of(source.config))
        seen = backward(run.layers(source), run.windows("calibration", source), observer, run.results("calibrations"))
        write_json(file, {i: {part: float(square) for part, square in each.items()} for i, each in enumerate(seen)})
    return {int(i): each for i, each in read_json(file).items()}


def _size(values: Mapping[str, Any]) -> Size:
    pattern = values["pattern"]
    return Size(**{**values, "pattern": None if pattern is None else tuple(pattern)})


class _Spectra:
    """What further ranks of every layer are worth, on the model as it came."""

    def __init__(self, stage: Stage, source: Checkpoint, collector: GramCollector) -> None:
        self.collector, self.family = collector, family_of(source.config)
        self.factoring, self.own = factoring_of(stage), stage.own_parameters
        self.spectra: dict[int, Spectra] = {}
        self.shapes: dict[int, Shapes] = {}

    def visit(self, index: int, layer: nn.Module, run: LayerPass | None = None) -> None:
        """One layer."""
        view = learned_view(layer, self.family)
        if view is None:
            if run is not None:
                run([], True)
            return
        if run is not None:
            self.collector.collect(view, run, True)
        experts = self.collector.experts(index, view, self.factoring, self.own, {})
        self.spectra[index] = self.factoring.spectra(experts, **self.own)
        self.shapes[index] = experts.shapes
        self.collector.release()
