"""What is common to measuring what changed weights of experts would cost, layer by layer on the uncompressed model.

E experts, N rows of each, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moe_compress.calibration.expert_inputs import ExpertInputs, ExpertInputSampler
from moe_compress.engine.forward import TOKENS_PER_BATCH, LayerPass
from moe_compress.engine.observer import Observer
from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.moe import moe_view

# Rows of every expert on which changed weights are tried.
ROWS = 64


class Sensitivity(ABC):
    """Visits the layers in turn, and lets `measure` table what each choice costs each expert."""

    def __init__(self, family: Family, tokens: int) -> None:
        self.family, self.rows_per_batch = family, -(-ROWS * TOKENS_PER_BATCH // tokens)

    def visit(self, index: int, layer: nn.Module, run: LayerPass) -> None:
        """One layer: sample what its experts see, then measure."""
        sample = ExpertInputSampler(self.family, self.rows_per_batch)
        run([*self.observers(), sample], True)
        if sample.found is not None:
            self.measure(index, layer, sample.found)

    def observers(self) -> Sequence[Observer]:
        """What else has to be seen of the next layer."""
        return ()

    @abstractmethod
    def measure(self, index: int, layer: nn.Module, rows: ExpertInputs) -> None:
        """Table the costs of one layer."""

    def changes(
        self, layer: nn.Module, rows: ExpertInputs, weights: Sequence[Tensor], trials: Iterable[Sequence[Tensor]]
    ) -> Iterator[Tensor]:
        """How each trial's weights change what an expert adds, gate included, [E, N, D]; no trial outlives its turn."""
        view = moe_view(layer, self.family)
        assert view is not None
        before_END = hf.run_rows(view.experts, rows.input_END)
        whole = [weight_EOI.clone() for weight_EOI in weights]
        for trial in trials:
            _fill(weights, trial)
            yield (hf.run_rows(view.experts, rows.input_END) - before_END) * rows.gate_EN.unsqueeze(2)
            _fill(weights, whole)


def _fill(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight_EOI, new_EOI in zip(weights, values, strict=True):
        weight_EOI.copy_(new_EOI)


def relative_square(change_END: Tensor, rows: ExpertInputs) -> Tensor:
    """Mean square over an expert's rows, over the energy of the stream, [E]."""
    square_E = change_END.double().square().sum((1, 2))
    return square_E / row_counts(rows) / max(rows.energy, torch.finfo(torch.float64).tiny)


def row_counts(rows: ExpertInputs) -> Tensor:
    """Rows that each expert has seen, at least 1, [E]."""
    return (rows.gate_EN != 0).sum(1).clamp_min(1)
