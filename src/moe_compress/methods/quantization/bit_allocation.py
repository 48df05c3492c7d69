"""How many bits each matrix gets: the least sum of costs within a budget, exactly.

N matrices or what they are joined to, E experts, S stacks of a layer, K widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron, vstack
from torch import Tensor

from moe_compress.methods.quantization.grid import BITS
from moe_compress.methods.weight_method import BitCosts, Bits

LEAST = float(BITS[0])


def choose(costs: BitCosts, sizes: Mapping[int, int], per: str, budget: float) -> Bits:
    """The cheapest widths of one matrix, one expert or one layer each, whose mean is the budget.

    costs: by layer and stack [E, K]; sizes: weights of one matrix, by layer.
    """
    rows, counts = [], []
    for layer, stacks in costs.items():
        joined_NK = _joined(torch.stack(list(stacks.values())), per)
        matrices = sum(len(table_EK) for table_EK in stacks.values())
        rows.append(joined_NK)
        counts += [sizes[layer] * matrices // len(joined_NK)] * len(joined_NK)
    found = iter(cheapest_widths(torch.cat(rows), counts, budget))
    bits: Bits = {}
    for layer, stacks in costs.items():
        experts = len(next(iter(stacks.values())))
        if per == "matrix":
            bits[layer] = {name: [next(found) for _ in range(experts)] for name in stacks}
        else:
            each = [next(found)] * experts if per == "layer" else [next(found) for _ in range(experts)]
            bits[layer] = {name: list(each) for name in stacks}
    return bits


def _joined(cost_SEK: Tensor, per: str) -> Tensor:
    """Costs of what gets one width together, [N, K]."""
    if per == "matrix":
        return cost_SEK.flatten(0, 1)
    return cost_SEK.sum(0) if per == "expert" else cost_SEK.sum((0, 1))[None]


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
