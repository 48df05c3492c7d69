"""How long and by which way a factorisation is solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_compress.methods.factorisation.structures import Activation

Solver = Literal["als", "adam"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """sweeps: of least squares by turns; activation: of mixed bases; solver: of the wrapper; seed: of either's start.

    steps, lr: of the wrapper's Adam and of fitting an activation; None: what each of the two takes by itself.
    """

    sweeps: int = 4
    activation: Activation = "linear"
    solver: Solver = "als"
    steps: int | None = None
    lr: float | None = None
    seed: int = 0
