"""What experts multiply, paired with what they would in the original model: sums of outer products of the two.

The original stream runs first and leaves what it sends to experts, token by token; the compressed one says which expert
a token meets and how much that counts. T tokens, D model width, I inputs, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.calibration.input_moments import Moments, RunningSums
from moe_compress.engine.observer import BatchInfo, ExpertObserver
from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.matrices import INNER, ROUTED
from moe_compress.models.moe import MoEView, inner_width


class OriginalInputs(ExpertObserver):
    """What a layer's experts are sent, [T, D] of each batch: a row for every token, zeros for one that meets nobody.

    Before the gate, where that scales what experts see.
    """

    def start(self, view: MoEView) -> None:
        """Begin without a batch; where rows have met their gate already, tokens are taken as they enter the block."""
        self.batches: list[Tensor] = []
        self.gated = hf.gate_on_input(view.experts)
        self.hook = view.block.register_forward_pre_hook(self._enter_block) if self.gated else None

    def _enter_block(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.batches.append(args[0].flatten(0, -2))

    def rows(self, rows: RoutedRows) -> None:
        """Keep the tokens of one batch."""
        if self.gated:
            return
        sent_TD = rows.input_RD.new_zeros(len(self.real_T), rows.input_RD.shape[1])
        sent_TD[rows.token_R] = rows.input_RD
        self.batches.append(sent_TD)

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """Nothing of it is kept in files."""
        if self.hook is not None:
            self.hook.remove()
        return {}


class InputCrosses(ExpertObserver):
    """Sums of g^2 x x'^T over the rows of a compressed stream, by source: x' what a matrix multiplies, x what it would.

    originals: of each batch, what the original stream sends to experts [T, D]. x of down projections is what the rows'
    experts, which are still the original ones, make of that. experts: those whose rows are summed (None: all); set
    anew between runs, they take turns, and `found` holds the sums of those that ran last, and the pooled ones of all
    that did.
    """

    def __init__(self, family: Family, originals: Sequence[Tensor]) -> None:
        super().__init__(family)
        self.originals = originals
        self.experts: range | None = None
        self.found: dict[str, Moments] = {}

    def start(self, view: MoEView) -> None:
        """Begin with empty sums; the pooled ones go on."""
        groups = view.num_experts if self.experts is None else len(self.experts)
        device, widths = view.router_rows_ED.device, {ROUTED: self.originals[0].shape[1], INNER: inner_width(view)}
        self.sums = {source: RunningSums(groups, width, "input_grams", device) for source, width in widths.items()}
        self.batch = -1

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count, and whose turn it is."""
        super().begin(batch)
        self.batch += 1

    def rows(self, rows: RoutedRows) -> None:
        """Pair the rows of one batch."""
        assert self.view is not None
        mine_R = self.real_T[rows.token_R]
        if self.experts is not None:
            mine_R = mine_R & (rows.expert_R >= self.experts.start) & (rows.expert_R < self.experts.stop)
        if not bool(mine_R.any()):
            return
        expert_R, gate_R1 = rows.expert_R[mine_R], rows.gate_R[mine_R].unsqueeze(1)
        sent_RD, on_input = self.originals[self.batch][rows.token_R[mine_R]], hf.gate_on_input(self.view.experts)
        sent_RD = sent_RD * gate_R1.to(sent_RD.dtype) if on_input else sent_RD
        inner_RF = hf.inner_rows(self.view.experts, sent_RD, expert_R)
        count_R1 = torch.ones_like(gate_R1) if on_input else gate_R1.float()
        group_R = expert_R - (self.experts.start if self.experts is not None else 0)
        for source, x_RI, now_RI in ((ROUTED, sent_RD, rows.input_RD), (INNER, inner_RF, rows.inner_RF)):
            self.sums[source].add(x_RI.float() * count_R1, group_R, now_RI[mine_R].float() * count_R1)

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """Sum what still waits; nothing of it is kept in files."""
        for source, sums in self.sums.items():
            sums.finish()
            before = self.found.get(source)
            pooled_II, count = sums.total.sum(0), int(sums.count_B.sum())
            if before is not None:
                pooled_II, count = pooled_II + before.pooled, count + before.pooled_count
            self.found[source] = Moments(sums.count_B, sums.total, pooled_II, count)
        return {}
