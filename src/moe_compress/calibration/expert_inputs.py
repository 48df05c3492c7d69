"""A few rows that each expert of a layer really saw, spread over the text: to try changed weights on.

E experts, N rows kept of each, D model width, R rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.engine.observer import ExpertObserver
from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """input_END: what the experts saw; gate_EN: the gates applied to what they return (1 where these scale the input),
    0 where an expert saw fewer rows; count_E: of all.

    energy: mean square of the hidden states that left the layer, per token.
    """

    input_END: Tensor
    gate_EN: Tensor
    count_E: Tensor
    energy: float


class ExpertInputSampler(ExpertObserver):
    """Keeps the first `each` rows of every expert in every batch; `found` is None for a layer without experts."""

    def __init__(self, family: Family, each: int) -> None:
        super().__init__(family)
        self.each = each
        self.found: ExpertInputs | None = None

    def start(self, view: MoEView) -> None:
        """Begin with nothing."""
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gate_on_input = hf.gate_on_input(view.experts)
        self.count_E = torch.zeros(view.num_experts, dtype=torch.long, device=view.router_rows_ED.device)

    def rows(self, rows: RoutedRows) -> None:
        """Take each expert's first rows of one batch."""
        real_R = self.real_T[rows.token_R]
        expert_R = rows.expert_R[real_R]
        seen_E = torch.bincount(expert_R, minlength=len(self.count_E))
        self.count_E += seen_E
        place_R = torch.arange(len(expert_R), device=expert_R.device) - (seen_E.cumsum(0) - seen_E)[expert_R]
        chosen_R = place_R < self.each
        gate_R = torch.ones_like(rows.gate_R) if self.gate_on_input else rows.gate_R
        self.parts.append((expert_R[chosen_R], rows.input_RD[real_R][chosen_R], gate_R[real_R][chosen_R]))

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """Sort what was kept by expert; nothing of it is kept in files."""
        expert_R, input_RD, gate_R = (torch.cat(column) for column in zip(*self.parts, strict=True))
        expert_R, order = expert_R.sort(stable=True)
        kept_E = torch.bincount(expert_R, minlength=len(self.count_E))
        place_R = torch.arange(len(expert_R), device=expert_R.device) - (kept_E.cumsum(0) - kept_E)[expert_R]
        shape = (len(kept_E), max(1, int(kept_E.max())))
        input_END = input_RD.new_zeros(*shape, input_RD.shape[-1])
        gate_EN = gate_R.new_zeros(shape)
        input_END[expert_R, place_R], gate_EN[expert_R, place_R] = input_RD[order], gate_R[order]
        self.found = ExpertInputs(input_END, gate_EN, self.count_E, self.energy)
        return {}
