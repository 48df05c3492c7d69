"""Windows of the calibration text that are held aside from a training, and the best state that they saw it in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.data.windows import Windows
from moe_compress.utils.logging import log


@dataclass(frozen=True, slots=True)
class Holdout:
    """trained: how many windows, the first ones, a training sees; rows: the numbers of those behind them."""

    trained: int
    rows: Tensor

    @classmethod
    def of(cls, share: float, windows: Windows) -> Holdout:
        """The last `share` of the windows, at least one; none of them where it is 0.

        Raises ValueError where none would be left to train on, or nothing to measure.
        """
        count = len(windows)
        held = max(1, round(share * count)) if share else 0
        rows = torch.arange(count - held, count)
        if held >= count:
            raise ValueError(
                f"holdout={share:g} of {count} windows leaves none to train on: a smaller share, or more text "
                "(samples=), is needed."
            )
        if held and not bool(windows.counted_NS[rows].any()):
            raise ValueError(f"holdout={share:g}: no token of the last {held} windows counts: use a larger share.")
        return cls(count - held, rows)

    def note(self, optimiser: Optimiser, held: dict[int, float], step: int, loss: float) -> None:
        """Enter the loss behind so many steps into `held`; of the best so far the state is remembered."""
        loss = loss if math.isfinite(loss) else math.inf
        if not held or loss < min(held.values()):
            optimiser.remember()
        held[step] = loss

    def settle(self, optimiser: Optimiser, held: dict[int, float]) -> dict[str, Any]:
        """Go back to the best state that was measured; what is to be reported, nothing where nothing was."""
        if not held:
            return {}
        best, first, last = min(held, key=lambda step: held[step]), held[min(held)], held[max(held)]
        optimiser.recall()
        if last > first:
            log.warning(
                "the loss on the windows that were held aside was %.4g before training and %.4g at its end: what is "
                "left is the state behind step %d, of %.4g. A lower lr= may help, or fewer steps=.",
                first, last, best, held[best],
            )  # fmt: skip
        losses = [float(f"{each:.6g}") if math.isfinite(each) else None for each in held.values()]
        said = {"windows": len(self.rows), "steps": [*held], "losses": losses}
        return {"holdout": {**said, "kept_step": best, "worse_at_the_end": last > first}}
