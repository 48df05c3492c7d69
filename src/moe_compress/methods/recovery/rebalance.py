"""Rebalance: selection biases move, without a gradient, until experts are used as evenly as the original's."""

from __future__ import annotations

from moe_compress.methods.recovery_method import Rebalancing
from moe_compress.methods.registry import recovery_method


@recovery_method(group="recovery", paper="auxiliary-loss-free load balancing (arXiv 2408.15664)", trains=False)
def rebalance(*, rounds: int = 40, rate: float = 0.02, tolerance: float = 0.05) -> Rebalancing:
    """Move selection biases on calibration text until the experts' load varies as the original's does.

    rounds: at most so many over the text for each layer; rate: of the first step, in the units of the scores (an
    expert's steps grow by a fifth while it is on one side of the mean load, and halve where it changes sides);
    tolerance: by which the coefficient of variation of an expert's tokens may stay above the original's.
    """
    if rounds < 1 or not 0.0 < rate < float("inf") or not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"rounds={rounds} rate={rate:g} tolerance={tolerance:g}: all above 0 are needed.")
    return Rebalancing(rounds=rounds, rate=rate, tolerance=tolerance)
