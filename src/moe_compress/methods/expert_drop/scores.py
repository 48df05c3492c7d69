"""Scores that rank whole experts, from the sums of one calibration pass. Higher means: keep.

x tokens, X_e those routed to expert e, g_e the gate weight the model really applied, f_e the expert's output
before the gate. All are float64 [E]. Sources: the papers named at each function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_compress.methods.score_registry import score

Sums = Mapping[str, Tensor]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over routed tokens; NaN marks an expert that no token reached."""
    return torch.where(count > 0, total / count, torch.nan)


@score("random", needs="nothing")
def random_score(experts: int, layer: int, seed: int) -> Tensor:
    """Uniform numbers that depend on seed and layer alone."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.rand(experts, generator=generator, dtype=torch.float64)


@score("frequency", needs="text")
def frequency(sums: Sums) -> Tensor:
    """|X_e|, how many tokens were routed to the expert."""
    return sums["count"]


@score("gate_mass", needs="text", paper="SEER-MoE, arXiv 2404.05089")
def gate_mass(sums: Sums) -> Tensor:
    """Sum of g_e over X_e (SEER-MoE, Muzio et al. 2024)."""
    return sums["gate"]


def gate_mass_full(sums: Sums) -> Tensor:
    """Sum of the router's probability over all tokens, routed to the expert or not (Unified-MoE-Compression)."""
    return sums["probability"]


@score("router_norm", needs="weights")
def router_norm(sums: Sums) -> Tensor:
    """Length of the expert's router row."""
    return sums["weight_router_norm"]


@score("weight_norm", needs="weights")
def weight_norm(sums: Sums) -> Tensor:
    """Frobenius norm of all the expert's weights."""
    return sums["weight_square"].sqrt()


@score("ean", needs="text", paper="arXiv 2510.13999")
def ean(sums: Sums) -> Tensor:
    """Expert activation norm: sum of |f_e| over X_e."""
    return sums["norm"]


@score("man", needs="text", paper="arXiv 2606.15716")
def man(sums: Sums) -> Tensor:
    """Mean activation norm: mean of |f_e| over X_e (arXiv 2606.15716)."""
    return _mean(sums["norm"], sums["count"])


@score("msan", needs="text", paper="arXiv 2606.15716")
def msan(sums: Sums) -> Tensor:
    """Mean squared activation norm: mean of |f_e|^2 over X_e (arXiv 2606.15716)."""
    return _mean(sums["norm_square"], sums["count"])


@score("weighted_ean", needs="text")
def weighted_ean(sums: Sums) -> Tensor:
    """Sum of g_e |f_e| over X_e."""
    return sums["gated_norm"]


@score("reap", needs="text", paper="REAP, arXiv 2510.13999")
def reap(sums: Sums) -> Tensor:
    """Router-weighted expert activation: mean of g_e |f_e| over X_e (REAP, arXiv 2510.13999)."""
    return _mean(sums["gated_norm"], sums["count"])


@score("aimer", needs="weights", paper="AIMER, arXiv 2603.18492")
def aimer(sums: Sums) -> Tensor:
    """Minus mean|W| / rms(W) over all the expert's weights (AIMER, arXiv 2603.18492, prunes the highest ratio)."""
    mean_abs = sums["weight_abs"] / sums["weight_count"]
    return -mean_abs / (sums["weight_square"] / sums["weight_count"]).sqrt()


@score("easy_ep", needs="text", paper="EASY-EP, arXiv 2504.06792")
def easy_ep(sums: Sums) -> Tensor:
    """Sum over X_e of g_e |f_e| times one minus the token's cosine before and after the routed experts.

    EASY-EP, arXiv 2504.06792. Raises ValueError where the experts' share of the stream is not known.
    """
    if bool(sums["easy_ep"].isnan().any()):
        raise ValueError(
            "score=easy_ep is not defined here: this family's experts work in a latent space, or a norm stands "
            "between them and the stream."
        )
    return sums["easy_ep"]


@score("max_activation", needs="text", paper="super experts, arXiv 2507.23279")
def max_activation(sums: Sums) -> Tensor:
    """Largest |entry| of f_e over X_e (super experts, arXiv 2507.23279)."""
    return sums["max"]


def super_experts(max_LE: Mapping[int, Tensor], total_layers: int) -> dict[int, list[int]]:
    """Experts with massive activations, by real layer id (arXiv 2507.23279).

    Those above both the 99.5th percentile over the model and a tenth of the largest, in the first three
    quarters of the layers (counted over all decoder layers, dense ones included).
    """
    everything = torch.cat(list(max_LE.values()))
    threshold = max(float(torch.quantile(everything, 0.995)), float(everything.max()) / 10)
    found = {}
    for layer, max_E in max_LE.items():
        ids = (max_E > threshold).nonzero().flatten().tolist()
        if ids and layer < 0.75 * total_layers:
            found[layer] = ids
    return found
