"""What each expert would lose at several fractions, measured in one pass, and the fractions that follow from it.

E experts, N fractions, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_compress.calibration.expert_inputs import ExpertInputs
from moe_compress.calibration.input_moments import InputMomentCollector, Moments
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.weights.sensitivity import Sensitivity, relative_square
from moe_compress.compression.weights.stage_matrices import StageMatrices
from moe_compress.engine.forward import Progress, walk_layers
from moe_compress.engine.observer import Observer
from moe_compress.methods import registry, sparsity_allocation
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, layer_matrices
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run


def expert_sparsities(
    stage: Stage, matrices: StageMatrices, source: Checkpoint, run: Run, progress: Progress | None = None
) -> dict[int, Tensor]:
    """The fraction of its weights that every expert loses, by layer [E]; on average what the recipe says."""
    windows = run.windows("calibration", source)
    layers = run.layers(source)
    experts = (matrix for found in matrices.by_layer.values() for matrix in found if matrix.kind == "experts")
    weights = next(experts).weight_BOI[0].numel()
    shared_out = stage.parameters[registry.find(stage.method).allocates]
    choices = sparsity_allocation.levels(shared_out, stage.parameters["spread"], weights)
    found = _SparsitySensitivity(stage, source, windows.tokens, choices)
    walk_layers(layers, windows, found.visit, progress=progress)
    return sparsity_allocation.choose(found.costs(), choices)


class _SparsitySensitivity(Sensitivity):
    """Tries every fraction on all matrices of an expert together."""

    def __init__(self, stage: Stage, source: Checkpoint, tokens: int, choices: list[float]) -> None:
        super().__init__(family_of(source.config), tokens)
        self.parameters, self.choices = stage.parameters, choices
        self.allocate = WeightStageOptions.of(stage.parameters).allocate
        trial = registry.find(stage.method).implementation.trial
        assert trial is not None
        self.trial = trial
        self.tables: dict[int, Tensor] = {}

    def observers(self) -> Sequence[Observer]:
        """The experts' inputs."""
        self.inputs = InputMomentCollector(self.family, ["experts"], "input_squares", None)
        return [self.inputs]

    def measure(self, index: int, layer: nn.Module, rows: ExpertInputs) -> None:
        """Costs [E, N], or for OWL the share of outliers [E]."""
        matrices = layer_matrices(layer, self.family, ["experts"])
        groups = _groups(index, matrices, self.inputs.found)
        share_E = rows.count_E.double() / rows.count_E.sum()
        if self.allocate == "utilisation":
            found = sparsity_allocation.sparsity_cost_by_use(share_E.cpu(), self.choices)
        elif self.allocate == "owl":
            scores = [w.abs() * g.moment.sqrt().unsqueeze(1) for g in groups for w in g.weights if g.moment is not None]
            found = torch.stack([sparsity_allocation.outlier_share(score) for score in scores]).mean(0)
        else:
            weights = [weight for group in groups for weight in group.weights]
            changes = self.changes(layer, rows, weights, self._trials(groups))
            found = torch.stack([relative_square(change_END, rows) for change_END in changes], 1)
            found = found * share_E.unsqueeze(1) if self.allocate == "both" else found
        self.tables[index] = found.cpu()

    def _trials(self, groups: Sequence[MatrixGroup]) -> Iterator[list[Tensor]]:
        """The matrices of all groups, at each fraction in turn."""
        for share in self.choices:
            tried: list[Tensor] = []
            for group in groups:
                sparsity_B = torch.full((len(group.names),), share)
                tried += self.trial(group, sparsity_B=sparsity_B, **self.parameters)
            yield tried

    def costs(self) -> Mapping[int, Tensor]:
        """The table of every layer; OWL's depends on the mean over all of them."""
        if self.allocate != "owl":
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
    groups = []
    for source, weights in by_source.items():
        found, names = moments[source], [f"expert {e} of layer {index}" for e in range(len(weights[0]))]
        groups.append(MatrixGroup(names, weights, found.mean(0.0, found.count_B < 1, True)))
    return groups
