"""How many bits each matrix gets: the least sum of costs within a budget, exactly. N matrices, K widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron, vstack
from torch import Tensor

from moe_compress.methods.quantization.grid import BITS

LEAST = float(BITS[0])


def cheapest_widths(cost_NK: Tensor, sizes: Sequence[int], budget: float) -> list[int]:
    """Bits of each matrix, of BITS: the choice with the least sum of costs among those of `budget` bits on average.

    A multiple-choice knapsack, solved to optimality by HiGHS. sizes: weights of each matrix.
    """
    count, widths = cost_NK.shape
    size_N = np.asarray(sizes, dtype=float) / max(sizes)
    cost = cost_NK.double().numpy().ravel()
    one_each = kron(eye_array(count), np.ones((1, widths)))
    total = csr_array(np.kron(size_N, BITS)[None])
    most = max(budget, LEAST) * size_N.sum() * (1 + 1e-12)
    found = milp(
        cost / max(float(np.abs(cost).max()), np.finfo(float).tiny),
        constraints=LinearConstraint(vstack([one_each, total]).tocsr(), [*np.ones(count), 0], [*np.ones(count), most]),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no choice of widths stays within {budget} bits a weight ({found.message}).")
    return [BITS[k] for k in found.x.reshape(count, widths).argmax(1)]


def bit_cost_by_use(share_E: Tensor, rare_first: bool) -> Tensor:
    """Costs [E, K] by utilisation alone: rounding errors fall by four with every bit, and count by an expert's share of
    the tokens, or by its inverse (`rare_first`: the article's guess that much used experts tolerate fewer bits).
    """
    weight_E = 1 / (share_E.double() + 1 / len(share_E)) if rare_first else share_E.double()
    return weight_E.unsqueeze(1) * torch.tensor([4.0**-bits for bits in BITS], dtype=torch.float64)
