"""What the inner neurons (channels) of each expert do on the tokens routed to it.

E experts, F neurons, R routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.engine.observer import ExpertObserver
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, inner_width


class ChannelStatistics(ExpertObserver):
    """Sums of squares of neurons' activations, with and without the gate, and the largest gated square, [E, F] each.

    `channel_square`, `channel_gated`, `channel_max`; `energy`: mean square of the stream behind the layer.
    """

    def start(self, view: MoEView) -> None:
        """Begin with empty sums."""
        shape = (3, view.num_experts, inner_width(view))
        self.sums = torch.zeros(shape, dtype=torch.float64, device=view.router_rows_ED.device)

    def rows(self, rows: RoutedRows) -> None:
        """Add the squares of one batch."""
        real_R = self.real_T[rows.token_R]
        expert_R = rows.expert_R[real_R]
        square_RF = rows.inner_RF[real_R].float().square()
        gated_RF = square_RF * rows.gate_R[real_R].float().square().unsqueeze(1)
        sums = torch.zeros(self.sums.shape, device=square_RF.device)
        sums[0].index_add_(0, expert_R, square_RF)
        sums[1].index_add_(0, expert_R, gated_RF)
        sums[2].scatter_reduce_(0, expert_R.unsqueeze(1).expand_as(gated_RF), gated_RF, "amax")
        self.sums[:2] += sums[:2]
        self.sums[2] = torch.maximum(self.sums[2], sums[2].double())

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer's sums on the CPU."""
        names = ("channel_square", "channel_gated", "channel_max")
        found = {name: table_EF.cpu().contiguous() for name, table_EF in zip(names, self.sums, strict=True)}
        return {**found, "energy": torch.tensor(self.energy, dtype=torch.float64)}
