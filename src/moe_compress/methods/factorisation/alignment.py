"""Neurons put in one order before experts share anything: their functions stay, their matrices come closer.

E experts, F neurons of an expert, D model width. ResMoE (arXiv 2503.06881) aligns to a barycentre as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moe_compress.methods.expert_merge.alignment import align_groups, permuted
from moe_compress.models.moe import Expert

Reference = Literal["nearest", "mean"]
PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
ROUNDS = 5


@torch.no_grad()
def align(experts: Callable[[int], Expert], count: int, reference: Reference = "mean", workers: int = 1) -> Tensor:
    """The order of every expert's neurons, int64 [E, F]: what was neuron order[e, i] comes to place i.

    Rows of gate and up, columns of down (and rows and columns of the Gram of what enters down) move together, so that
    no expert's function changes; `permuted` of the merging method does it. Matched by the Hungarian method on gate, up
    and down. reference: the expert nearest the mean of all, or from there the mean of what is aligned, until orders
    stay or ROUNDS are over. workers: threads; their number does not change the result.
    """
    nearest = _nearest(experts, count)
    order_EF = _orders(experts, count, experts(nearest), workers)
    if reference == "nearest":
        return order_EF
    for _ in range(ROUNDS):
        mean = _mean(partial(_in_order, experts, order_EF), count)
        new_EF = _orders(experts, count, mean, workers)
        if torch.equal(new_EF, order_EF):
            break
        order_EF = new_EF
    return order_EF


def _in_order(experts: Callable[[int], Expert], order_EF: Tensor, e: int) -> Expert:
    return permuted(experts(e), order_EF[e])


def _orders(experts: Callable[[int], Expert], count: int, reference: Expert, workers: int) -> Tensor:
    """Every expert's order beside the reference's."""
    found = align_groups([[-1, *range(count)]], lambda e: reference if e < 0 else experts(e), workers=workers)
    return torch.stack([found[e] for e in range(count)])


def _mean(experts: Callable[[int], Expert], count: int) -> Expert:
    """The mean of all matrices and biases, fp32."""
    totals: dict[str, Tensor] = {}
    for e in range(count):
        expert = experts(e)
        for part in PARTS:
            value = getattr(expert, part)
            if value is not None:
                totals[part] = totals[part] + value.float() if part in totals else value.float()
    return Expert(*(totals[part] / count if part in totals else None for part in PARTS))  # type: ignore[arg-type]


def _nearest(experts: Callable[[int], Expert], count: int) -> int:
    """The expert nearest the mean, its matrices each measured by the mean's length there."""
    mean = _mean(experts, count)
    distances = []
    for e in range(count):
        pairs = [(getattr(experts(e), part), getattr(mean, part)) for part in PARTS[:3]]
        ratios = [float((own.float() - all_).norm() / all_.norm()) for own, all_ in pairs if own is not None]
        distances.append(sum(ratio**2 for ratio in ratios))
    return min(range(count), key=lambda e: distances[e])
