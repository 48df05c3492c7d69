"""How many weights each expert of a model loses, at an exact budget for all of them together.

Every expert takes one of a few levels around the common fraction; a table of costs says what each level does to it,
and the cheapest choice with the right sum is found exactly. E experts, N levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_compress.methods.allocation import cheapest
from moe_compress.models.matrices import Matrix

Allocation = Literal["uniform", "utilisation", "sensitivity", "both", "owl"]
LEVELS = 9
# OWL (arXiv 2310.05175): a score is an outlier if it is above so many times the mean of its matrix.
OUTLIER = 5.0


def require_allocatable(
    layers: Mapping[int, Sequence[Matrix]], allocate: Allocation, sparsity: float | None, spread: float
) -> None:
    """Raise ValueError unless fractions can differ between these experts at an exact budget."""
    chosen = [matrix for matrices in layers.values() for matrix in matrices if matrix.kind == "experts"]
    experts = {matrix.weight_BOI[0].numel() for matrix in chosen}
    if sparsity is None:
        raise ValueError(f"allocate={allocate} shares out sparsity=; a pattern is the same in every expert.")
    if not 0 < spread < 1:
        raise ValueError(f"spread={spread}: how far an expert's sparsity may be from the common one is in (0, 1).")
    if len(experts) != 1:
        raise ValueError(f"allocate={allocate} needs experts (where=) of one size; this recipe has {sorted(experts)}.")
    weights = min(experts)
    if len(set(levels(sparsity, spread, weights))) == 1:
        least = ((LEVELS - 1) // 2 + 0.5) / weights
        raise ValueError(
            f"allocate={allocate} has nothing to share out at sparsity={sparsity} spread={spread}: of {weights} "
            f"weights both, and what stays, are at least {least:.3g}."
        )


def levels(sparsity: float, spread: float, weights: int) -> list[float]:
    """Fractions from sparsity - spread to sparsity + spread, or as far as both sides may go.

    Steps are whole numbers of the `weights` of a matrix, so that rounding cannot add up to another budget.
    """
    half = (LEVELS - 1) // 2
    step = int(min(spread, sparsity, 1 - sparsity) * weights / half) / weights
    return [sparsity + step * (n - half) for n in range(LEVELS)]


def choose(cost_EN: Mapping[int, Tensor], choices: list[float]) -> dict[int, Tensor]:
    """Each expert's fraction, by layer: the least sum of costs with the mean of `choices` on average, exactly."""
    rows = [row.tolist() for table_EN in cost_EN.values() for row in table_EN]
    found = iter(cheapest(rows, len(rows) * (len(choices) - 1) // 2))
    return {
        layer: torch.tensor([choices[next(found)] for _ in table_EN], dtype=torch.float64)
        for layer, table_EN in cost_EN.items()
    }


def sparsity_cost_by_use(share_E: Tensor, choices: list[float]) -> Tensor:
    """Costs [E, N] that grow with an expert's share of the tokens: the less used lose more."""
    return share_E.double().unsqueeze(1) * torch.tensor(choices, dtype=torch.float64).square()


def by_outliers(outliers_E: Tensor, mean: float, reach: float, choices: list[float]) -> Tensor:
    """Costs [E, N] of being away from what OWL gives: fewer zeros where more scores stick out, in proportion."""
    wanted_E = sum(choices) / len(choices) - reach * (outliers_E.double() / max(mean, 1e-12) - 1).clamp(-1, 1)
    return (torch.tensor(choices, dtype=torch.float64) - wanted_E.unsqueeze(1)).square()


def outlier_share(score_BOI: Tensor) -> Tensor:
    """Share of scores above OUTLIER times their mean, [B]."""
    mean_B11 = score_BOI.mean((1, 2), keepdim=True)
    return (score_BOI > OUTLIER * mean_B11).double().mean((1, 2))
