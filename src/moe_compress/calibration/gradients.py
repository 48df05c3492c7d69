"""Gradients of the loss at experts' inner neurons and outputs, layer by layer from the last to the first."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from moe_compress.calibration.input_moments import RunningSums
from moe_compress.engine.observer import ExpertObserver
from moe_compress.models import hf
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView


class ChannelGradients(ExpertObserver):
    """Sums of a^2 per neuron, and of the outer products of the gradients at each expert's output, while it runs back.

    `heapr` [E, F]: sum a_i^2 times w_i' M w_i, with w_i the neuron's column of the down projection and M the mean
    outer product of the loss's gradients at the expert's output (HEAPr, arXiv 2509.22299).
    """

    def start(self, view: MoEView) -> None:
        """Begin with empty sums."""
        down_EDF = view.stacks()["down"]
        experts, width, inner = down_EDF.shape
        self.squares = RunningSums(experts, inner, "input_squares", down_EDF.device)
        self.gradients = RunningSums(experts, width, "input_grams", down_EDF.device)

    def rows(self, rows: RoutedRows) -> None:
        """Add one batch: activations now, gradients when they come back."""
        real_R = self.real_T[rows.token_R]
        expert_R = rows.expert_R[real_R]
        self.squares.add(rows.inner_RF.detach()[real_R], expert_R)

        def back(gradient_TD: Tensor) -> None:
            gated_RD = gradient_TD[rows.token_R] * rows.gate_R.detach().unsqueeze(1)
            self.gradients.add(gated_RD[real_R], expert_R)

        rows.routed_TD.register_hook(back)

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer's scores on the CPU."""
        self.gradients.finish()
        down_EDF = view.stacks()["down"].float()
        mean_EDD = self.gradients.total / self.gradients.count_B.clamp_min(1)[:, None, None]
        curved_EF = ((mean_EDD @ down_EDF) * down_EDF).sum(1)
        return {"heapr": (self.squares.total * curved_EF).double().cpu()}


class OutputGradients(ExpertObserver):
    """`curvature` [D, D]: mean outer product, over tokens, of the loss's gradients at what the routed experts add."""

    def start(self, view: MoEView) -> None:
        """Begin with empty sums."""
        width = view.router_rows_ED.shape[1]
        self.gradients = RunningSums(1, width, "input_grams", view.router_rows_ED.device)

    def rows(self, rows: RoutedRows) -> None:
        """Take the gradients of one batch when they come back."""
        real_T = self.real_T

        def back(gradient_TD: Tensor) -> None:
            real_RD = gradient_TD[real_T]
            self.gradients.add(real_RD, torch.zeros(len(real_RD), dtype=torch.long, device=real_RD.device))

        rows.routed_TD.register_hook(back)

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer's mean on the CPU."""
        self.gradients.finish()
        mean_DD = self.gradients.total[0] / self.gradients.count_B.clamp_min(1)
        return {"curvature": mean_DD.double().cpu()}


class OutputSquares(ExpertObserver):
    """`gate`, `up`, `down`, [1] each: mean squares of the loss's gradients at what experts' projections put out.

    Of gate and up before it is activated, over rows, without the expert's gate (of which inputs are told already); of
    down at what the routed experts add, over tokens.
    """

    def start(self, view: MoEView) -> None:
        """Begin with empty sums."""
        self.sums: dict[str, list[float]] = defaultdict(list)

    def rows(self, rows: RoutedRows) -> None:
        """Take the gradients of one batch when they come back."""
        assert self.view is not None
        view, real_T = self.view, self.real_T
        real_R, input_RD = real_T[rows.token_R], rows.input_RD.detach()
        gate_R = rows.gate_R.detach()[real_R].double()
        on_input = hf.gate_on_input(view.experts)
        counted = float(len(gate_R) if on_input else gate_R.square().sum())

        def back(gradient_TD: Tensor) -> None:
            real_TD = gradient_TD[real_T]
            self.sums["down"] += [float(real_TD.double().square().mean(1).sum()), float(len(real_TD))]

        def before(gradient_RF: Tensor) -> None:
            found = hf.gradients_before(view.experts, input_RD, rows.expert_R, gradient_RF)
            for part, each_RF in found.items():
                self.sums[part] += [float(each_RF[real_R].double().square().mean(1).sum()), counted]

        rows.routed_TD.register_hook(back)
        rows.inner_RF.register_hook(before)

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer's means."""
        means = {part: sum(found[::2]) / max(sum(found[1::2]), 1e-30) for part, found in self.sums.items()}
        return {part: torch.tensor([mean], dtype=torch.float64) for part, mean in means.items()}
