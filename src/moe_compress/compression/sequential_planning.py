"""Planning layer by layer on what earlier edits left: later layers see the compressed stream (propagate=compressed).

Two streams run side by side: the original one says what each layer should give (NAEE's target), the compressed one
is what the experts are judged on and, once the layer is edited, passed on.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from moe_compress.calibration.artefact import mix_components, mix_weights
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.windows import FOLDS, parse_mix
from moe_compress.edits.apply import apply_edit
from moe_compress.edits.edits import Edit, Plan
from moe_compress.engine.forward import LayerPass, walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import Observer
from moe_compress.methods import registry
from moe_compress.models.families import family_of
from moe_compress.models.moe import learned_view
from moe_compress.models.shape import ModelShape, moe_shape
from moe_compress.models.sublayers import block_names
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.run.progress import progress_bar
from moe_compress.utils.devices import measured_cost
from moe_compress.utils.logging import log


def plan_progressively(stage: Stage, checkpoint: Checkpoint, run: Run) -> tuple[Plan, dict[str, Any]]:
    """Decide, carry out and go on, one MoE layer at a time; nothing of it is kept for other recipes."""
    windows = run.windows("calibration", checkpoint)
    log.info("planning layer by layer: %d tokens of %s.", windows.tokens, run.options.data)
    layers = run.layers(checkpoint)
    planner = _Planner(stage, checkpoint, run, layers)
    with measured_cost(run.device) as cost, progress_bar("planning") as progress:
        walk_layers(layers, windows, planner.visit, streams=2, progress=progress)
    found: dict[str, Any] = {"propagate": "compressed", "hash": windows.fingerprint, "mix": planner.mix}
    return Plan(planner.edits, planner.scores, planner.report), {**windows.description, **found, **cost}


class _Planner:
    """Visits the layers in turn and remembers what was decided."""

    def __init__(self, stage: Stage, checkpoint: Checkpoint, run: Run, layers: StreamedLayers) -> None:
        self.stage, self.model, self.config = stage, layers.model, checkpoint.text_config
        self.family = family_of(checkpoint.config)
        self.names = block_names(layers.model)
        self.total = checkpoint.num_layers
        self.windows = run.windows("calibration", checkpoint)
        self.mix = parse_mix(run.options.mix, self.windows.domains)
        tokens_D = torch.bincount(
            self.windows.domain_N, self.windows.counted_NS.sum(1).double(), minlength=len(self.windows.domains)
        )
        self.weight_C = mix_weights(self.windows.domains, tokens_D, self.mix, None)
        self.edits: list[Edit] = []
        self.scores: dict[int, list[float | None]] = {}
        self.report: dict[str, Any] = {}

    def visit(self, index: int, layer: nn.Module, original: LayerPass, compressed: LayerPass) -> None:
        """One layer: the original stream first, then the compressed one before and after the edits."""
        view = learned_view(layer, self.family)
        if view is None:
            original([], True)
            compressed([], True)
            return
        sampled = self.stage.needs == "outputs"
        target = OutputSampler(self.family, self.config, self.windows.tokens, light=True)
        original([target] if sampled else [], True)
        observers: list[Observer] = [ExpertStatistics(self.family, self.config, len(self.windows.domains) * FOLDS)]
        if sampled:
            judge = OutputSampler(self.family, self.config, self.windows.tokens)
            judge.targets = target.routed
            observers.append(judge)
        seen = compressed(observers, False)
        sums = LayerStatistics(
            shape=moe_shape(self.model, index, view),
            sums=mix_components(seen[0], self.weight_C),
            total_layers=self.total,
            paper_gate=self.family.paper_gate,
            view=lambda: contextlib.nullcontext(view),
            output_sample=lambda: OutputSample.from_tensors(seen[1]).weighted(self.weight_C),
        )
        for edit in self._decide(sums):
            apply_edit(self.model, self.names, edit)
        compressed([], True)

    def _decide(self, layer: LayerStatistics) -> list[Edit]:
        shape = ModelShape(moe=[layer.shape], total=self.total)
        plan = registry.find(self.stage.method).run(
            ModelStatistics(shape=shape, layers=[layer]), **self.stage.parameters
        )
        self.edits += plan.edits
        self.scores |= plan.scores
        for key, value in plan.report.items():
            merged = isinstance(value, dict) and isinstance(self.report.get(key), dict)
            self.report[key] = {**self.report[key], **value} if merged else value
        return plan.edits
