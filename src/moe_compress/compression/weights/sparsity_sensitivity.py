"""What each expert would lose at several fractions, measured in one pass, and the fractions that follow from it.

The pass runs on the uncompressed model. E experts, N fractions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.calibration.expert_inputs import ExpertInputs, ExpertInputSampler
from moe_compress.calibration.input_moments import InputMomentCollector, Moments
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.engine.forward import TOKENS_PER_BATCH, LayerPass, Progress, walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import Observer
from moe_compress.methods import registry
from moe_compress.methods.pruning import sparsity_allocation
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, layer_matrices
from moe_compress.models.moe import moe_view
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run

# Rows of every expert on which changed weights are tried.
ROWS = 64


def expert_sparsities(
    stage: Stage, source: Checkpoint, run: Run, progress: Progress | None = None
) -> dict[int, Tensor]:
    """The fraction of its weights that every expert loses, by layer [E]; on average what the recipe says."""
    windows = run.windows("calibration", source)
    layers = run.layers(source)
    weights = next(matrix.weight_BOI[0].numel() for matrix in _experts_of(layers))
    choices = sparsity_allocation.levels(stage.parameters["sparsity"], stage.parameters["spread"], weights)
    survey = _Survey(stage, source, choices, -(-ROWS * TOKENS_PER_BATCH // windows.tokens))
    walk_layers(layers, windows, survey.visit, progress=progress)
    return sparsity_allocation.choose(survey.costs(), survey.choices)


def _experts_of(layers: StreamedLayers) -> list[Matrix]:
    family = family_of(layers.model.config)
    return [m for layer in hf.decoder_layers(layers.model) for m in layer_matrices(layer, family, ["experts"])]


class _Survey:
    """Visits the layers in turn and tables what each fraction costs each expert."""

    def __init__(self, stage: Stage, source: Checkpoint, choices: list[float], each: int) -> None:
        self.family, self.each = family_of(source.config), each
        self.options = stage.parameters
        self.choices = choices
        trial = registry.find(stage.method).implementation.trial
        assert trial is not None
        self.trial: Callable[..., list[Tensor]] = trial
        self.kind: sparsity_allocation.Allocation = self.options["allocate"]
        self.tables: dict[int, Tensor] = {}

    def visit(self, index: int, layer: nn.Module, run: LayerPass) -> None:
        """One layer: see what its experts see, then try every fraction on a few rows."""
        inputs, sample = (
            InputMomentCollector(self.family, ["experts"], "input_squares", None),
            ExpertInputSampler(self.family, self.each),
        )
        observers: Sequence[Observer] = [inputs, sample]
        run(observers, True)
        if sample.found is None:
            return
        matrices = layer_matrices(layer, self.family, ["experts"])
        groups = _groups(index, matrices, inputs.found)
        share_E = sample.found.count_E.double() / sample.found.count_E.sum()
        if self.kind == "utilisation":
            self.tables[index] = sparsity_allocation.sparsity_cost_by_use(share_E.cpu(), self.choices)
        elif self.kind == "owl":
            scores = [w.abs() * g.moment.sqrt().unsqueeze(1) for g in groups for w in g.weights if g.moment is not None]
            self.tables[index] = (
                torch.stack([sparsity_allocation.outlier_share(score) for score in scores]).mean(0).cpu()
            )
        else:
            error_EN = self._errors(layer, groups, matrices, sample.found)
            used = share_E.unsqueeze(1) if self.kind == "both" else 1.0
            self.tables[index] = (error_EN * used).cpu()

    def _errors(
        self, layer: nn.Module, groups: Sequence[MatrixGroup], matrices: Sequence[Matrix], rows: ExpertInputs
    ) -> Tensor:
        """Mean squared change of what an expert adds, gate included, over the energy of the stream, [E, N]."""
        view = moe_view(layer, self.family)
        assert view is not None
        before_END = hf.run_rows(view.experts, rows.input_END)
        whole = [matrix.weight_BOI.clone() for matrix in matrices]
        columns = []
        for share in self.choices:
            for group in groups:
                sparsity_B = torch.full((len(group.names),), share)
                trial = self.trial(group, sparsity_B=sparsity_B, **self.options)
                for weight, new_BOI in zip(group.weights, trial, strict=True):
                    weight.copy_(new_BOI)
            change_END = (hf.run_rows(view.experts, rows.input_END) - before_END) * rows.gate_EN.unsqueeze(2)
            columns.append(change_END.double().square().sum((1, 2)))
            for matrix, weight_BOI in zip(matrices, whole, strict=True):
                matrix.weight_BOI.copy_(weight_BOI)
        seen_E1 = (rows.gate_EN != 0).sum(1, keepdim=True).clamp_min(1)
        return torch.stack(columns, 1) / seen_E1 / max(rows.energy, torch.finfo(torch.float64).tiny)

    def costs(self) -> Mapping[int, Tensor]:
        """The table of every layer; OWL's depends on the mean over all of them."""
        if self.kind != "owl":
            return self.tables
        mean = float(torch.cat(list(self.tables.values())).mean())
        reach = (self.choices[-1] - self.choices[0]) / 2
        return {
            i: sparsity_allocation.by_outliers(table_E, mean, reach, self.choices) for i, table_E in self.tables.items()
        }


def _groups(index: int, matrices: Sequence[Matrix], moments: Mapping[str, Moments]) -> list[MatrixGroup]:
    by_source: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        by_source.setdefault(matrix.source, []).append(matrix.weight_BOI)
    groups: list[Any] = []
    for source, weights in by_source.items():
        found, names = moments[source], [f"expert {e} of layer {index}" for e in range(len(weights[0]))]
        groups.append(MatrixGroup(names, weights, found.mean(0.0, found.count_B < 1, True)))
    return groups
