"""What a layer's router chose on a sample of tokens, and how far two routers differ.

T tokens, E experts, R routed rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.model import hf
from moe_compress.model.families import Family
from moe_compress.model.hf import RoutedRows
from moe_compress.model.moe import moe_view
from moe_compress.stream.observers import BatchInfo, evenly_T


class Choices:
    """Takes `used` (which experts, bool [T, E]) and `probability` (softmax over the logits) of sampled tokens."""

    def __init__(self, family: Family, real_tokens: int, sample: int) -> None:
        self.family = family
        self.real_tokens = real_tokens
        self.sample = min(sample, real_tokens)
        self.found: dict[str, Tensor] = {}

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the layer's router and experts."""
        self.view = moe_view(layer, self.family)
        self.passed = 0
        self.used: list[Tensor] = []
        self.probability: list[Tensor] = []
        if self.view is not None:
            hf.tap(self.view.block, self.view.experts, self._rows)
            self.hook = self.view.router.register_forward_hook(self._router)

    def begin(self, batch: BatchInfo) -> None:
        """Choose the batch's tokens."""
        real_T = batch.real_T.nonzero().flatten()
        self.token_T = real_T[evenly_T(self.passed, len(real_T), self.sample, self.real_tokens, real_T.device)]
        self.passed += len(real_T)

    def _rows(self, rows: RoutedRows) -> None:
        assert self.view is not None
        used_TE = torch.zeros(len(rows.routed_TD), self.view.num_experts, dtype=torch.bool, device=rows.token_R.device)
        used_TE[rows.token_R, rows.expert_R] = True
        self.used.append(used_TE[self.token_T])

    def _router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.view is not None
        rows = self.view.rows
        logits_TE = [t for t in output if t.is_floating_point() and t.shape[-1] == rows][self.family.logits_at]
        self.probability.append(logits_TE.reshape(-1, rows)[self.token_T].double().softmax(-1))

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """Join what was seen; nothing of it is kept in files."""
        self.found = {}
        if self.view is not None:
            hf.untap(self.view.block, self.view.experts, self._rows)
            self.hook.remove()
            self.found = {"used": torch.cat(self.used), "probability": torch.cat(self.probability)}
        return {}


def routing_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """flips: share of tokens that use other experts; overlap: mean share of a token's experts that stay the same;
    kl: of the new router's distribution from the old one's, nats.
    """
    same_T = (before["used"] & after["used"]).sum(1).double()
    old_TE, new_TE = (each["probability"].clamp_min(1e-12) for each in (before, after))
    return {
        "flips": float((before["used"] != after["used"]).any(1).double().mean()),
        "overlap": float((same_T / before["used"].sum(1).clamp_min(1)).mean()),
        "kl": float((old_TE * (old_TE / new_TE).log()).sum(1).mean()),
    }
