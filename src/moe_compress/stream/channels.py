"""What the inner neurons (channels) of each expert do on the tokens routed to it.

E experts, F neurons, R routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_compress.model import hf
from moe_compress.model.families import Family
from moe_compress.model.hf import RoutedRows
from moe_compress.model.moe import inner_width, moe_view
from moe_compress.stream.observers import BatchInfo


class ChannelSums:
    """Sums of squares of neurons' activations, with and without the gate, and the largest gated square, [E, F] each.

    `channel_square`, `channel_gated`, `channel_max`; `energy`: mean square of the stream behind the layer. Nothing for
    a layer without experts.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    def enter(self, index: int, layer: nn.Module) -> None:
        """Start with empty sums and listen to the layer's experts."""
        self.view = moe_view(layer, self.family)
        self.energy = self.tokens = 0.0
        if self.view is None:
            return
        shape = (3, self.view.num_experts, inner_width(self.view))
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self.view.router_rows_ED.device)
        hf.tap(self.view.block, self.view.experts, self._rows)

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count."""
        self.real_T = batch.real_T

    def _rows(self, rows: RoutedRows) -> None:
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

    def end(self, hidden_BSD: Tensor) -> None:
        """Add up the stream's energy."""
        real_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[self.real_T]
        self.energy += float(real_TD.double().square().sum())
        self.tokens += len(real_TD)

    def leave(self) -> dict[str, Tensor]:
        """The layer's sums on the CPU."""
        if self.view is None:
            return {}
        hf.untap(self.view.block, self.view.experts, self._rows)
        names = ("channel_square", "channel_gated", "channel_max")
        found = {name: table_EF.cpu().contiguous() for name, table_EF in zip(names, self.sums, strict=True)}
        return {**found, "energy": torch.tensor(self.energy / max(self.tokens, 1), dtype=torch.float64)}
