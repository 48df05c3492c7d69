"""Observers watch a layer while it runs. `ExpertStatistics` records in one pass what every expert score needs.

Sums, not means, in float64, per component (domain and fold of the calibration text): they add up over batches
and processes, and can be mixed afterwards. T tokens, R routed (token, expert) pairs, C components, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moe_compress.calibration.weight_statistics import weight_sums
from moe_compress.engine.observer import BatchInfo
from moe_compress.models import hf
from moe_compress.models.dense_mlp import shared_gate
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, by_expert, learned_view, router_logits

ROW_SUMS = ("count", "gate", "norm", "norm_square", "gated_norm")
RATIO_BINS = 256


class ExpertStatistics:
    """All statistics of routed experts from the k experts that each token really used.

    Per layer: `count`, `gate`, `norm` (of the expert's output before the gate), `norm_square`, `gated_norm`,
    `easy_ep` (gated norm times how far the routed experts turn the token), `probability` (router over all
    experts): [C, E] sums; `max` [C, E]; `both` (tokens that use both experts), `logit_gram` (inner products of
    the router's logits, a router row each): [C, E, E]; `mean_output` and `mean_gated_output` (times the gate) over
    the routed tokens of all components [E, D]; `ratio`: histogram of gates over the token's largest [C, RATIO_BINS];
    `total`, `total_square`: of a token's gates; `shared_gate`: of that of the shared experts, where they have one;
    `tokens` [C]; weight sums [E]. Nothing for a layer without experts.
    """

    def __init__(self, family: Family, config: Any, components: int) -> None:
        self.family = family
        self.components = components
        self.residual_scale = math.prod(float(getattr(config, key, 1.0)) for key in family.residual_keys)
        self.view: MoEView | None = None

    def enter(self, index: int, layer: nn.Module) -> None:
        """Start with empty sums and listen to the layer's experts and router."""
        self.index = index
        self.view = learned_view(layer, self.family)
        if self.view is None:
            return
        device = self.view.router_rows_ED.device
        cells = self.components * self.view.num_experts
        self.row_sums = torch.zeros(cells, len(ROW_SUMS), dtype=torch.float64, device=device)
        self.output: Tensor | None = None
        self.easy_ep = torch.zeros(cells, dtype=torch.float64, device=device)
        self.max = torch.zeros(cells, dtype=torch.float64, device=device)
        self.probability = torch.zeros(self.components, self.view.num_experts, dtype=torch.float64, device=device)
        self.both = torch.zeros(self.components * self.view.num_experts**2, dtype=torch.float64, device=device)
        self.logit_gram = torch.zeros(self.components, *2 * [self.view.router_rows], dtype=torch.float64, device=device)
        self.ratio = torch.zeros(self.components * RATIO_BINS, dtype=torch.float64, device=device)
        self.totals = torch.zeros(self.components, 2, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(self.components, dtype=torch.float64, device=device)
        self.shared = torch.zeros(self.components, dtype=torch.float64, device=device)
        hf.tap(self.view.block, self.view.experts, self._rows)
        self.hooks = [self.view.router.register_forward_hook(self._router)]
        self.gate = shared_gate(self.view)
        if self.gate is not None:
            self.hooks.append(self.gate.register_forward_hook(self._shared))

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
        self._outputs(rows, real_R)
        self.pending = (cell_R, rows.token_R[real_R], gated_R, rows.routed_TD)
        self._gates(rows, real_R, len(rows.routed_TD))

    def _outputs(self, rows: RoutedRows, real_R: Tensor) -> None:
        """Sums of the experts' outputs, before and after the gate."""
        assert self.view is not None
        if self.output is None:
            shape = (2, self.view.num_experts, rows.output_RD.shape[-1])
            self.output = torch.zeros(shape, dtype=torch.float32, device=rows.output_RD.device)
        output_RD, gate_R = rows.output_RD.float(), rows.gate_R.float()
        expert_R = rows.expert_R
        if not bool(real_R.all()):
            output_RD, gate_R, expert_R = output_RD[real_R], gate_R[real_R], expert_R[real_R]
        self.output[0].index_add_(0, expert_R, output_RD)
        self.output[1].index_add_(0, expert_R, output_RD * gate_R.unsqueeze(1))

    def _gates(self, rows: RoutedRows, real_R: Tensor, tokens: int) -> None:
        """What is known of a token's experts together: who is used with whom, and how uneven their gates are."""
        assert self.view is not None
        token_R, expert_R, gate_R = rows.token_R[real_R], rows.expert_R[real_R], rows.gate_R[real_R].double()
        component_R = self.batch.component_T[token_R]
        used_TE = torch.zeros(tokens, self.view.num_experts, device=token_R.device)
        used_TE[token_R, expert_R] = 1
        peak_T = torch.zeros(tokens, dtype=torch.float64, device=token_R.device)
        peak_T.scatter_reduce_(0, token_R, gate_R, "amax", include_self=False)
        total_T = torch.zeros_like(peak_T).index_add_(0, token_R, gate_R)
        bin_R = (gate_R / peak_T[token_R] * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
        self.ratio.index_add_(0, component_R * RATIO_BINS + bin_R, torch.ones_like(gate_R))
        for component in self.batch.component_T.unique().tolist():
            mine_T = (self.batch.component_T == component) & self.batch.real_T
            one_TE = used_TE[mine_T]
            size = self.view.num_experts**2
            self.both[component * size : (component + 1) * size] += (one_TE.T @ one_TE).double().flatten()
            self.totals[component] += torch.stack([total_T[mine_T].sum(), total_T[mine_T].square().sum()])

    def _router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.view is not None
        rows = self.view.router_rows
        logits_TE = router_logits(output, rows, self.family)[self.batch.real_T].double()
        if self.family.router_scores == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        else:
            scores_TE = logits_TE.softmax(-1)
        component_T = self.batch.component_T[self.batch.real_T]
        for component in component_T.unique().tolist():
            mine_TE = logits_TE[component_T == component]
            self.logit_gram[component] += mine_TE.T @ mine_TE
        scores_TE = by_expert(scores_TE, self.view)
        self.probability.index_add_(0, component_T, scores_TE)
        self.tokens.index_add_(0, component_T, torch.ones_like(component_T, dtype=torch.float64))

    def _shared(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """What the output of the shared experts is multiplied by."""
        real_T = self.batch.real_T
        self.shared.index_add_(0, self.batch.component_T[real_T], output.flatten()[real_T].double().sigmoid())

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
        hf.untap(self.view.block, self.view.experts, self._rows)
        for hook in self.hooks:
            hook.remove()
        heard = float(self.row_sums[:, 0].sum()) > 0 or float(self.tokens.sum()) == 0
        assert heard, f"layer {self.index}: tokens were routed, but no expert reported one"
        shape = (self.components, self.view.num_experts)
        sums = {name: self.row_sums[:, i].reshape(shape) for i, name in enumerate(ROW_SUMS)}
        for name, table in sums.items():
            self._require_finite(name, table)
        sums |= {"easy_ep": self.easy_ep.reshape(shape), "max": self.max.reshape(shape)}
        sums |= {"probability": self.probability, "tokens": self.tokens, "logit_gram": self.logit_gram}
        sums |= {"both": self.both.reshape(*shape, -1), "ratio": self.ratio.reshape(self.components, -1)}
        if self.output is not None:
            count_E = sums["count"].sum(0).clamp_min(1)
            means = self.output / count_E.unsqueeze(1).float()
            sums |= {"mean_output": means[0], "mean_gated_output": means[1]}
        sums |= {"total": self.totals[:, 0], "total_square": self.totals[:, 1]}
        sums |= {"shared_gate": self.shared} if self.gate is not None else {}
        sums |= {f"weight_{name}": value for name, value in weight_sums(self.view).items()}
        return {name: value.cpu().contiguous() for name, value in sums.items()}

    def _require_finite(self, name: str, table_CE: Tensor) -> None:
        bad = (~table_CE.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"layer {self.index}: the statistic {name!r} of experts {bad[:5]} is not finite: the weights or the "
                "activations overflow; try dtype=float32."
            )
