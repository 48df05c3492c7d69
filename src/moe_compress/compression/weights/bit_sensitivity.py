"""What each matrix of each expert would lose at 2, 3, 4 and 8 bits, measured in one pass, and the widths that follow.

The pass runs on the uncompressed model; each stack of matrices is rounded alone and tried on a few rows of each expert.
E experts, K widths, N rows, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_compress.calibration.expert_inputs import ExpertInputs, ExpertInputSampler
from moe_compress.calibration.gradients import OutputGradients
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.weights.sparsity_sensitivity import ROWS
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import TOKENS_PER_BATCH, LayerPass, Progress, walk_layers
from moe_compress.methods.quantization.bit_allocation import bit_cost_by_use, cheapest_widths
from moe_compress.methods.quantization.grid import BITS, rtn
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Matrix, layer_matrices
from moe_compress.models.modeling.bit_packing import dequantized
from moe_compress.models.moe import moe_view
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run

Costs = dict[int, dict[str, Tensor]]
GroupSizes = Mapping[tuple[int, str], int]


def expert_bits(
    stage: Stage, source: Checkpoint, run: Run, sizes: GroupSizes, progress: Progress | None = None
) -> dict[int, dict[str, list[int]]]:
    """Bits of every matrix, by layer and name of its stack; on average what the recipe says."""
    windows = run.windows("calibration", source)
    layers = run.layers(source)
    curved: list[dict[str, Tensor]] = []
    if stage.parameters["by"] == "gradient":
        curved = backward(layers, windows, OutputGradients(family_of(source.config)), run.results("calibrations"))
    survey = _Survey(stage, source, sizes, -(-ROWS * TOKENS_PER_BATCH // windows.tokens), curved)
    walk_layers(layers, windows, survey.visit, progress=progress)
    return choose(survey.costs, survey.sizes, stage.parameters["per"], stage.parameters["budget"])


def choose(costs: Costs, sizes: Mapping[int, int], per: str, budget: float) -> dict[int, dict[str, list[int]]]:
    """The cheapest widths of one matrix, one expert or one layer each, whose mean is the budget.

    costs: by layer and stack [E, K]; sizes: weights of one matrix, by layer.
    """
    rows, counts = [], []
    for layer, stacks in costs.items():
        table_SEK = torch.stack(list(stacks.values()))
        parts, experts = table_SEK.shape[:2]
        joined = {"matrix": table_SEK.flatten(0, 1), "expert": table_SEK.sum(0), "layer": table_SEK.sum((0, 1))[None]}[
            per
        ]
        rows.append(joined)
        counts += [sizes[layer] * parts * experts // len(joined)] * len(joined)
    found = iter(cheapest_widths(torch.cat(rows), counts, budget))
    bits: dict[int, dict[str, list[int]]] = {}
    for layer, stacks in costs.items():
        experts = len(next(iter(stacks.values())))
        if per == "matrix":
            bits[layer] = {name: [next(found) for _ in range(experts)] for name in stacks}
        else:
            each = [next(found)] * experts if per == "layer" else [next(found) for _ in range(experts)]
            bits[layer] = {name: list(each) for name in stacks}
    return bits


class _Survey:
    """Visits the layers in turn and tables what each width costs each matrix."""

    def __init__(
        self, stage: Stage, source: Checkpoint, sizes: GroupSizes, each: int, curved: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.family, self.each, self.group_sizes, self.curved = family_of(source.config), each, sizes, curved
        self.options, self.stored = stage.parameters, source.stored_dtype
        self.costs: Costs = {}
        self.sizes: dict[int, int] = {}

    def visit(self, index: int, layer: nn.Module, run: LayerPass) -> None:
        """One layer: sample what its experts see, then try every width of every stack of matrices."""
        sample = ExpertInputSampler(self.family, self.each)
        run([sample], True)
        if sample.found is None:
            return
        matrices = [m for m in layer_matrices(layer, self.family, ["experts"]) if self.group_sizes[index, m.name]]
        share_E = sample.found.count_E.double().cpu() / sample.found.count_E.sum().cpu()
        self.sizes[index] = matrices[0].weight_BOI[0].numel()
        if self.options["by"] in ("used", "rare"):
            table_EK = bit_cost_by_use(share_E, self.options["by"] == "rare")
            self.costs[index] = {matrix.name: table_EK for matrix in matrices}
            return
        metric_DD = self.curved[index]["curvature"] if self.curved else None
        errors = {m.name: self._errors(index, layer, m, sample.found, metric_DD) for m in matrices}
        self.costs[index] = {name: error_EK.cpu() * share_E.unsqueeze(1) for name, error_EK in errors.items()}

    def _errors(
        self, index: int, layer: nn.Module, matrix: Matrix, rows: ExpertInputs, metric_DD: Tensor | None
    ) -> Tensor:
        """Mean squared change of what an expert adds, gate included, [E, K]: over the stream's energy, or as the loss's
        gradient sees it.
        """
        view = moe_view(layer, self.family)
        assert view is not None
        before_END, whole_EOI = hf.run_rows(view.experts, rows.input_END), matrix.weight_BOI.clone()
        columns, energy = [], max(rows.energy, torch.finfo(torch.float64).tiny)
        for bits in BITS:
            codes, scale = rtn(whole_EOI, bits, self.group_sizes[index, matrix.name], self.stored, self.options["clip"])
            matrix.weight_BOI.copy_(dequantized(codes, scale))
            change_END = (hf.run_rows(view.experts, rows.input_END) - before_END) * rows.gate_EN.unsqueeze(2)
            if metric_DD is None:
                columns.append(change_END.double().square().sum((1, 2)) / energy)
            else:
                columns.append(((change_END.double() @ metric_DD.to(change_END.device)) * change_END).sum((1, 2)))
        matrix.weight_BOI.copy_(whole_EOI)
        return torch.stack(columns, 1) / (rows.gate_EN != 0).sum(1, keepdim=True).clamp_min(1)
