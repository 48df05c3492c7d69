"""Observers watch a layer while it runs. `ExpertSums` records in one pass what every expert score needs.

Sums, not means, in float64, per component (domain and fold of the calibration text): they add up over batches
and processes, and can be mixed afterwards. T tokens, R routed (token, expert) pairs, C components, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moe_compress.model import hf
from moe_compress.model.families import Family
from moe_compress.model.hf import RoutedRows
from moe_compress.model.moe import MoEShape, MoEView, moe_view, weight_sums

# Config keys of a factor on what the MoE block adds to the stream (Granite, MiniMax).
RESIDUAL_SCALES = ("residual_multiplier", "mlp_beta_factor")
ROW_SUMS = ("count", "gate", "norm", "norm_square", "gated_norm")


@dataclass(frozen=True, slots=True)
class LayerSums:
    """What a method is given of one MoE layer: its shape, [E] sums over the calibration text, and context."""

    shape: MoEShape
    sums: Mapping[str, Tensor]
    total_layers: int
    paper_gate: str


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What an observer must know of a batch: which tokens are real, and the component of each. Flat, [T]."""

    real_T: Tensor
    component_T: Tensor


class Observer(Protocol):
    """Watches one layer at a time; `leave` returns what it saw of it."""

    def enter(self, index: int, layer: nn.Module) -> None:
        """A layer is about to run all batches."""

    def begin(self, batch: BatchInfo) -> None:
        """A batch is about to enter the layer."""

    def end(self, hidden_BSD: Tensor) -> None:
        """The batch has left the layer as these hidden states."""

    def leave(self) -> dict[str, Tensor]:
        """The layer is done."""


class ExpertSums:
    """All statistics of routed experts from the k experts that each token really used.

    Per layer: `count`, `gate`, `norm` (of the expert's output before the gate), `norm_square`, `gated_norm`,
    `easy_ep` (gated norm times how far the routed experts turn the token), `probability` (router over all
    experts): [C, E] sums; `max` [C, E]; `tokens` [C]; weight sums [E]. A layer without experts gives nothing.
    """

    def __init__(self, family: Family, config: Any, components: int) -> None:
        self.family = family
        self.components = components
        self.residual_scale = math.prod(float(getattr(config, key, 1.0)) for key in RESIDUAL_SCALES)
        self.view: MoEView | None = None

    def enter(self, index: int, layer: nn.Module) -> None:
        """Start with empty sums and listen to the layer's experts and router."""
        self.index = index
        self.view = moe_view(layer, self.family)
        if self.view is None:
            return
        device = self.view.router_rows_ED.device
        cells = self.components * self.view.num_experts
        self.row_sums = torch.zeros(cells, len(ROW_SUMS), dtype=torch.float64, device=device)
        self.easy_ep = torch.zeros(cells, dtype=torch.float64, device=device)
        self.max = torch.zeros(cells, dtype=torch.float64, device=device)
        self.probability = torch.zeros(self.components, self.view.num_experts, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(self.components, dtype=torch.float64, device=device)
        hf.tap(self.view.block, self.view.experts, self._rows)
        self.hook = self.view.router.register_forward_hook(self._router)

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count."""
        self.batch = batch
        self.pending: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def _rows(self, rows: RoutedRows) -> None:
        assert self.view is not None
        real_R = self.batch.real_T[rows.token_R]
        cell_R = self.batch.component_T[rows.token_R] * self.view.num_experts + rows.expert_R
        norm_R = torch.linalg.vector_norm(rows.output_RD, dim=-1, dtype=torch.float32).double()
        gate_R = rows.gate_R.double()
        peak_R = rows.output_RD.abs().amax(-1).double()
        gated_R = gate_R * norm_R
        values = torch.stack([torch.ones_like(norm_R), gate_R, norm_R, norm_R.square(), gated_R], dim=1)
        if not bool(real_R.all()):
            values, cell_R, gated_R, peak_R = values[real_R], cell_R[real_R], gated_R[real_R], peak_R[real_R]
        self.row_sums.index_add_(0, cell_R, values)
        self.max.scatter_reduce_(0, cell_R, peak_R, "amax")
        self.pending = (cell_R, rows.token_R[real_R], gated_R, rows.routed_TD)

    def _router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.view is not None
        experts = self.view.num_experts
        assert isinstance(output, tuple), "a router returns (logits, weights, indices)"
        logits_TE = [t for t in output if t.is_floating_point() and t.shape[-1] == experts][self.family.logits_at]
        logits_TE = logits_TE.reshape(-1, experts)[self.batch.real_T].double()
        if self.family.router_scores == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        else:
            scores_TE = logits_TE.softmax(-1)
        component_T = self.batch.component_T[self.batch.real_T]
        self.probability.index_add_(0, component_T, scores_TE)
        self.tokens.index_add_(0, component_T, torch.ones_like(component_T, dtype=torch.float64))

    def end(self, hidden_BSD: Tensor) -> None:
        """EASY-EP's token weight: one minus the cosine between the stream without and with the routed experts."""
        if self.view is None or self.pending is None:
            return
        cell_R, token_R, gated_R, routed_TD = self.pending
        after_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        if self.family.normed_output or after_TD.shape != routed_TD.shape:
            self.easy_ep.fill_(torch.nan)
            return
        before_TD = after_TD.float() - self.residual_scale * routed_TD.float()
        # |a/|a| - b/|b||^2 = 2 (1 - cos): 1 - cos itself would cancel where the experts hardly turn the token.
        turn_T = (normalize(before_TD, dim=-1) - normalize(after_TD.float(), dim=-1)).square().sum(-1) / 2
        self.easy_ep.index_add_(0, cell_R, turn_T.double()[token_R] * gated_R)

    def leave(self) -> dict[str, Tensor]:
        """The layer's sums on the CPU; ValueError if any is not finite."""
        if self.view is None:
            return {}
        hf.tap(self.view.block, self.view.experts, None)
        self.hook.remove()
        heard = float(self.row_sums[:, 0].sum()) > 0 or float(self.tokens.sum()) == 0
        assert heard, f"layer {self.index}: tokens were routed, but no expert reported one"
        shape = (self.components, self.view.num_experts)
        sums = {name: self.row_sums[:, i].reshape(shape) for i, name in enumerate(ROW_SUMS)}
        for name, table in sums.items():
            self._require_finite(name, table)
        sums |= {"easy_ep": self.easy_ep.reshape(shape), "max": self.max.reshape(shape)}
        sums |= {"probability": self.probability, "tokens": self.tokens}
        sums |= {f"weight_{name}": value for name, value in weight_sums(self.view).items()}
        return {name: value.cpu().contiguous() for name, value in sums.items()}

    def _require_finite(self, name: str, table_CE: Tensor) -> None:
        bad = (~table_CE.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"layer {self.index}: the statistic {name!r} of experts {bad[:5]} is not finite: the weights or the "
                "activations overflow; try dtype=float32."
            )
