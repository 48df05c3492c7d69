"""What each matrix of each expert would lose at each width, measured in one pass, and the widths that follow.

E experts, K widths, N rows, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_compress.calibration.expert_inputs import ExpertInputs
from moe_compress.calibration.gradients import OutputGradients
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.weights.sensitivity import Sensitivity, relative_square, row_counts
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import Progress, walk_layers
from moe_compress.methods.weight_method import BitAllocation, Bits, GroupSizes
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, layer_matrices
from moe_compress.run.context import Run


def expert_bits(
    allocation: BitAllocation, source: Checkpoint, run: Run, sizes: GroupSizes, progress: Progress | None = None
) -> Bits:
    """Bits of every matrix, by layer and name of its stack; on average what the recipe says."""
    windows = run.windows("calibration", source)
    layers = run.layers(source)
    curved: list[dict[str, Tensor]] = []
    if allocation.by_gradient:
        curved = backward(layers, windows, OutputGradients(family_of(source.config)), run.results("calibrations"))
    found = _BitSensitivity(allocation, source, windows.tokens, sizes, curved)
    walk_layers(layers, windows, found.visit, progress=progress)
    return allocation.choose(found.costs, found.sizes)


class _BitSensitivity(Sensitivity):
    """Rounds each stack of matrices alone, at every width."""

    def __init__(
        self,
        allocation: BitAllocation,
        source: Checkpoint,
        tokens: int,
        sizes: GroupSizes,
        curved: Sequence[Mapping[str, Tensor]],
    ) -> None:
        super().__init__(family_of(source.config), tokens)
        self.allocation, self.group_sizes, self.curved, self.stored = allocation, sizes, curved, source.stored_dtype
        self.costs: dict[int, dict[str, Tensor]] = {}
        self.sizes: dict[int, int] = {}

    def measure(self, index: int, layer: nn.Module, rows: ExpertInputs) -> None:
        """Costs by stack, [E, K]."""
        matrices = [m for m in layer_matrices(layer, self.family, ["experts"]) if self.group_sizes[index, m.name]]
        if not matrices:
            return
        share_E = rows.count_E.double().cpu() / rows.count_E.sum().cpu()
        self.sizes[index] = matrices[0].weight_BOI[0].numel()
        if self.allocation.by_use is not None:
            table_EK = self.allocation.by_use(share_E)
            self.costs[index] = {matrix.name: table_EK for matrix in matrices}
            return
        metric_DD = self.curved[index]["curvature"] if self.curved else None
        errors = {m.name: self._errors(index, layer, m, rows, metric_DD) for m in matrices}
        self.costs[index] = {name: error_EK.cpu() * share_E.unsqueeze(1) for name, error_EK in errors.items()}

    def _errors(
        self, index: int, layer: nn.Module, matrix: Matrix, rows: ExpertInputs, metric_DD: Tensor | None
    ) -> Tensor:
        """Mean squared change of what an expert adds, gate included, [E, K]: over the stream's energy, or as the loss's
        gradient sees it.
        """
        whole_EOI, size = matrix.weight_BOI.clone(), self.group_sizes[index, matrix.name]
        trials = ([self.allocation.rounded(whole_EOI, bits, size, self.stored)] for bits in self.allocation.widths)
        columns = []
        for change_END in self.changes(layer, rows, [matrix.weight_BOI], trials):
            if metric_DD is None:
                columns.append(relative_square(change_END, rows))
            else:
                curved_END = change_END.double() @ metric_DD.to(change_END.device)
                columns.append((curved_END * change_END).sum((1, 2)) / row_counts(rows))
        return torch.stack(columns, 1)
