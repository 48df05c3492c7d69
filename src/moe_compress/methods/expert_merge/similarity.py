"""What makes two experts alike: distances and similarities, float64 [E, E]. E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.models.moe import MoEView

# A squared distance from a Gram matrix is all cancellation below this share of the squared lengths.
CANCELLED = 1e-12


def logit_cosine(logit_gram_EE: Tensor) -> Tensor:
    """Cosine of router-logit columns, [E, E], from the sum over tokens of logit x logit (M-SMoE)."""
    return _cosine(logit_gram_EE.double().cpu())


def output_cosine(mean_ED: Tensor) -> Tensor:
    """Cosine of the experts' mean outputs, [E, E]; an expert whose output is zero is like none."""
    rows_ED = mean_ED.double().cpu()
    return _cosine(rows_ED @ rows_ED.T)


def output_distance(mean_ED: Tensor) -> Tensor:
    """Euclidean distance between the experts' mean outputs, [E, E] (HC-SMoE, arXiv 2410.08589)."""
    from scipy.spatial.distance import pdist, squareform  # here: to plan needs none of it, and should not wait for it

    return torch.from_numpy(squareform(pdist(mean_ED.double().cpu().numpy())))


def weight_cosine(view: MoEView) -> Tensor:
    """Cosine between all weights of two experts as they are stored, [E, E]: neurons are not matched."""
    gram_EE = torch.zeros(view.num_experts, view.num_experts, dtype=torch.float64)
    for matrix in view.stacks().values():
        flat_EN = matrix.flatten(1).float()
        gram_EE += (flat_EN @ flat_EN.T).double().cpu()
    return _cosine(gram_EE)


def jaccard(both_EE: Tensor, count_E: Tensor) -> Tensor:
    """Co-activation: tokens that chose both experts over tokens that chose either, [E, E]."""
    both_EE, count_E = both_EE.double().cpu(), count_E.double().cpu()
    either_EE = count_E[:, None] + count_E - both_EE
    share_EE = torch.where(either_EE == 0, 0.0, both_EE / either_EE)
    return share_EE.fill_diagonal_(1)


def gaussian_logit_similarity(logit_gram_EE: Tensor) -> Tensor:
    """exp(-d^2 / 2s^2), d the distance between two router-logit columns and s its median over pairs, [E, E].

    The router's half of REAM's similarity (arXiv 2604.04356). It depends on neither the number of tokens nor on what
    a token adds to all its logits. If most pairs are equal (s = 0), it is 1 for those and 0 for the others.
    """
    square_EE = _square_distance(logit_gram_EE.double().cpu())
    pairs = square_EE[~torch.eye(len(square_EE), dtype=torch.bool)]
    scale = pairs.median() if len(pairs) else torch.tensor(0.0, dtype=torch.float64)
    return torch.exp(-square_EE / (2 * scale)) if scale > 0 else (square_EE == 0).double()


def _cosine(gram_EE: Tensor) -> Tensor:
    length_E = gram_EE.diagonal().sqrt()
    product_EE = length_E[:, None] * length_E
    cosine_EE = torch.where(product_EE == 0, 0.0, gram_EE / product_EE).clamp(-1, 1)
    # A NaN stays where it is, also on the diagonal, so that it is noticed.
    return torch.where(torch.eye(len(gram_EE), dtype=torch.bool) & cosine_EE.isfinite(), 1.0, cosine_EE)


def _square_distance(gram_EE: Tensor) -> Tensor:
    square_E = gram_EE.diagonal()
    sum_EE = square_E[:, None] + square_E
    distance_EE = sum_EE - 2 * gram_EE
    return torch.where(distance_EE <= CANCELLED * sum_EE, 0.0, distance_EE)
