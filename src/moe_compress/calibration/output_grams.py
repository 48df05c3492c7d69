"""How much the loss minds what experts' projections put out: second moments of its gradients there, in files by layer.

E experts, F neurons of an expert, D model width, R rows, B experts (or one for all).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_compress.calibration.input_moments import RunningSums
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.engine.observer import ExpertObserver
from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView


def output_file(folder: Path, layer: int) -> Path:
    """Where the moments of a layer are kept."""
    return folder / f"outputs-{layer:05d}.safetensors"


class OutputGrams(ExpertObserver):
    """Writes the second moments of each layer as the loss's gradient comes back through it.

    `gate` (where there is one), `up` [B, F, F]: of the gradients at what these put out, before it is activated, summed
    over the rows of an expert; the gate is part of them, and so they are divided by its mean square: inputs are counted
    by it already. `count` [B]: rows. `down` [D, D]: mean over tokens of those at what the routed experts add. pools:
    sums over all experts' rows in place of each expert's.
    """

    def __init__(self, family: Family, folder: Path, pools: bool) -> None:
        super().__init__(family)
        self.folder, self.pools = folder, pools

    def enter(self, index: int, layer: nn.Module) -> None:
        """Remember which layer it is."""
        self.index = index
        super().enter(index, layer)

    def start(self, view: MoEView) -> None:
        """Begin with empty sums."""
        stacks, groups = view.stacks(), 1 if self.pools else view.num_experts
        _, width, inner = stacks["down"].shape
        device = stacks["down"].device
        self.sums: dict[str, RunningSums] = {
            part: RunningSums(groups, inner, "input_grams", device) for part in ("gate", "up") if part in stacks
        }
        self.added = RunningSums(1, width, "input_grams", device)
        self.square_B = torch.zeros(groups, device=device)

    def rows(self, rows: RoutedRows) -> None:
        """Take the gradients of one batch when they come back."""
        assert self.view is not None
        real_T = self.real_T
        real_R = real_T[rows.token_R]
        group_R = torch.zeros_like(rows.expert_R) if self.pools else rows.expert_R
        group_R = group_R[real_R]
        gate_R = rows.gate_R.detach().float()[real_R]
        on_input = hf.gate_on_input(self.view.experts)
        self.square_B.index_add_(0, group_R, torch.ones_like(gate_R) if on_input else gate_R.square())

        def back(gradient_TD: Tensor) -> None:
            real_RD = gradient_TD[real_T]
            self.added.add(real_RD, torch.zeros(len(real_RD), dtype=torch.long, device=real_RD.device))

        rows.routed_TD.register_hook(back)
        rows.inner_RF.register_hook(self._before(self.view, rows, real_R, group_R))

    def _before(self, view: MoEView, rows: RoutedRows, real_R: Tensor, group_R: Tensor) -> Callable[[Tensor], None]:
        input_RD = rows.input_RD.detach()

        def back(gradient_RF: Tensor) -> None:
            found = hf.gradients_before(view.experts, input_RD, rows.expert_R, gradient_RF)
            for part, sums in self.sums.items():
                sums.add(found[part][real_R], group_R)

        return back

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """Write the layer's file; nothing stays in memory."""
        for sums in (*self.sums.values(), self.added):
            sums.finish()
        count_B = self.sums["up"].count_B
        scale_B = (count_B / self.square_B).nan_to_num(0.0, 0.0, 0.0)  # an expert without rows has sums of zeros
        found = {"count": count_B, "down": self.added.total[0] / self.added.count_B.clamp_min(1)}
        found |= {part: sums.total.mul_(scale_B[:, None, None]) for part, sums in self.sums.items()}
        write_shard(output_file(self.folder, self.index), found)
        return {}
