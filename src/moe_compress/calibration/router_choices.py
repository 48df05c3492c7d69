"""What a layer's router chose on a sample of tokens, and how far two routers differ.

T tokens, E experts, R routed rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.engine.observer import BatchInfo, ExpertObserver, evenly_T
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, router_logits


class RouterChoices(ExpertObserver):
    """Takes `used` (which experts, bool [T, E]) and `probability` (softmax over the logits) of sampled tokens."""

    def __init__(self, family: Family, real_tokens: int, sample: int) -> None:
        super().__init__(family)
        self.real_tokens = real_tokens
        self.sample = min(sample, real_tokens)
        self.found: dict[str, Tensor] = {}

    def start(self, view: MoEView) -> None:
        """Listen to the router as well."""
        self.experts, self.router_rows = view.num_experts, view.router_rows
        self.used: list[Tensor] = []
        self.probability: list[Tensor] = []
        self.hook = view.router.register_forward_hook(self._router)

    def begin(self, batch: BatchInfo) -> None:
        """Choose the batch's tokens."""
        super().begin(batch)
        real_T = batch.real_T.nonzero().flatten()
        # Tokens are counted as batches end, so those of earlier batches are in `tokens` now.
        self.token_T = real_T[evenly_T(self.tokens, len(real_T), self.sample, self.real_tokens, real_T.device)]

    def rows(self, rows: RoutedRows) -> None:
        """Take the experts of the batch's chosen tokens."""
        used_TE = torch.zeros(len(rows.routed_TD), self.experts, dtype=torch.bool, device=rows.token_R.device)
        used_TE[rows.token_R, rows.expert_R] = True
        self.used.append(used_TE[self.token_T])

    def _router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        logits_TE = router_logits(output, self.router_rows, self.family)
        self.probability.append(logits_TE[self.token_T].double().softmax(-1))

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """Join what was seen; nothing of it is kept in files."""
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
