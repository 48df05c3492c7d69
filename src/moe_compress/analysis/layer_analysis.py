"""What the experts of a layer do and which of them could go: a judgement with intervals, from one pass.

Nothing here runs a model. A verdict needs ROUTED tokens an expert; below that only the numbers are given.
D domains, F folds of each, C = D * F components, E experts.

Intervals (95 %): Wilson's, on the number of tokens divided by the layer's design effect, which is how much more the
experts' shares differ between the folds of the text than they would if tokens were drawn one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from moe_compress.analysis.similarity import Similarity, all_groups, moe_type, pairs, similarities
from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.calibration.output_sample import OutputSample
from moe_compress.data.windows import FOLDS
from moe_compress.methods.expert_drop import scores, subset_search
from moe_compress.models.shape import MoEShape

# Fewest tokens that an expert must see, on average, before anything is said of it.
ROUTED = 50
# Prune candidates: their share of tokens is below this part of the mean share, at the upper end of its interval.
COLD = 0.3
# Specialists: this many times as large a share of a domain's tokens as of all others, at the lower end.
SPECIALIST = 2.0
# Generalists: in no domain more than this many times more or less than elsewhere, over the whole interval.
GENERALIST = 1.5
# Merge candidates: mean cosine of two experts' outputs on the same tokens.
SIMILAR = 0.6
Z = NormalDist().inv_cdf(0.975)


def require_cosine(threshold: float) -> float:
    """The threshold itself; ValueError if no cosine can be on one side of it or the other."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: a cosine from -1 to 1 is needed, such as {SIMILAR}.")
    return threshold


@dataclass(frozen=True, slots=True)
class Preference:
    """How many times as large an expert's share of a domain's tokens is as its share of all others, with interval."""

    expert: int
    domain: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnalysis:
    """One MoE layer. utilization: share of tokens that use each expert; similarity: by aligned `weights`, by `routed`
    tokens (used by one token) and by `outputs` on the same tokens; removal_error: how far the routed output would be
    off without each expert (None: router's rule unknown); reap: the score that orders experts; warning: why there are
    no verdicts, if there are none. The verdicts are the last fields.
    """

    layer_idx: int
    num_experts: int
    top_k: int
    tokens: int
    domains: list[str]
    utilization: list[float]
    utilization_interval: list[tuple[float, float]]
    design_effect: float | None
    coefficient_of_variation: float
    similarity: dict[str, Similarity]
    moe_type: str
    median_output_similarity: float
    reap: list[float | None]
    routed_mass: list[float]
    removal_error: list[float] | None
    preferences: list[Preference]
    threshold: float
    warning: str | None = None
    merge_candidates: list[tuple[int, int, float]] = field(default_factory=list)
    prune_candidates: list[int] = field(default_factory=list)
    specialist_experts: list[int] = field(default_factory=list)
    generalist_experts: list[int] = field(default_factory=list)
    mergeable_groups: list[list[int]] = field(default_factory=list)
    potential_reduction: int = 0
    max_compression_ratio: float = 0.0
    recommended_target: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @property
    def outputs_EE(self) -> Tensor:
        """Cosine of the experts' outputs."""
        return torch.tensor(self.similarity["outputs"].matrix, dtype=torch.float64)

    @property
    def counts_E(self) -> Tensor:
        """Tokens that each expert saw."""
        return torch.tensor(self.utilization, dtype=torch.float64) * self.tokens


def analyse(layer: LayerStatistics, count_CE: Tensor, token_C: Tensor, threshold: float = SIMILAR) -> LayerAnalysis:
    """Judge one layer. count_CE, token_C: routed tokens and all tokens of every domain and fold."""
    sample, tokens = layer.output_sample(), int(token_C.sum())
    effect = design_effect(count_CE, token_C)
    share_E = layer.sums["count"] / layer.sums["tokens"]
    low_E, high_E = wilson(share_E, tokens / (effect or 1.0))
    outputs_EE = sample.cosine_EE.double().clamp(-1, 1).fill_diagonal_(1.0)
    preferences = _preferences(layer.by_domain, effect or 1.0)
    warning = _warning(count_CE, tokens, effect)
    verdicts: dict[str, Any] = {"recommended_target": layer.shape.num_experts}
    if warning is None:
        verdicts = _verdicts(layer.shape, outputs_EE, layer.sums["count"], share_E, high_E, preferences, threshold)
    kind, middle = moe_type(outputs_EE)
    reap_E = scores.reap(layer.sums)
    return LayerAnalysis(
        layer_idx=layer.shape.layer,
        num_experts=layer.shape.num_experts,
        top_k=layer.shape.top_k,
        tokens=tokens,
        domains=list(layer.by_domain),
        utilization=share_E.tolist(),
        utilization_interval=list(zip(low_E.tolist(), high_E.tolist(), strict=True)),
        design_effect=effect,
        coefficient_of_variation=float(share_E.std(correction=0) / share_E.mean()),
        similarity=similarities(layer, sample, outputs_EE, tokens),
        moe_type=kind,
        median_output_similarity=middle,
        reap=[value if math.isfinite(value) else None for value in reap_E.tolist()],
        routed_mass=layer.sums["gate"].tolist(),
        removal_error=_removal_errors(sample),
        preferences=preferences,
        threshold=threshold,
        warning=warning,
        **verdicts,
    )


# --- utilisation --------------------------------------------------------------------------------------------


def design_effect(count_CE: Tensor, token_C: Tensor) -> float | None:
    """Spread of the experts' shares between folds over that of independent tokens, at least 1; None with one fold.

    The mean of Pearson's statistic over experts and degrees of freedom, folds compared within their domain.
    """
    count_DFE = count_CE.double().reshape(-1, FOLDS, count_CE.shape[1])
    token_DF = token_C.double().reshape(-1, FOLDS)
    token_DF1 = token_DF.unsqueeze(2)
    share_D1E = count_DFE.sum(1, keepdim=True) / token_DF1.sum(1, keepdim=True).clamp_min(1)
    variance_DFE = token_DF1 * share_D1E * (1 - share_D1E)
    used_DFE = variance_DFE > 0
    pearson = ((count_DFE - token_DF1 * share_D1E).square() / variance_DFE)[used_DFE].sum()
    freedom = float((used_DFE.sum(1) - 1).clamp_min(0).sum())
    return max(1.0, float(pearson) / freedom) if freedom else None


def wilson(share_E: Tensor, tokens: float) -> tuple[Tensor, Tensor]:
    """Wilson's 95 % interval of shares of so many tokens."""
    square = Z * Z / max(tokens, 1e-9)
    middle_E = (share_E + square / 2) / (1 + square)
    half_E = (square * share_E * (1 - share_E) + square**2 / 4).clamp_min(0).sqrt() / (1 + square)
    return (middle_E - half_E).clamp_min(0), (middle_E + half_E).clamp_max(1)


def _preferences(by_domain: Mapping[str, Mapping[str, Tensor]], effect: float) -> list[Preference]:
    """Every expert in every domain against the rest of the text; nothing where there is one domain."""
    if len(by_domain) < 2:
        return []
    count_DE = torch.stack([sums["count"] for sums in by_domain.values()])
    token_D1 = torch.stack([sums["tokens"] for sums in by_domain.values()]).reshape(-1, 1)
    # Half a token on both sides keeps the ratio of a share to none finite.
    inside_DE = (count_DE + 0.5) / (token_D1 + 1)
    outside_DE = (count_DE.sum(0) - count_DE + 0.5) / (token_D1.sum() - token_D1 + 1)
    variance_DE = (1 - inside_DE).clamp_min(0) / (inside_DE * token_D1)
    variance_DE = variance_DE + (1 - outside_DE).clamp_min(0) / (outside_DE * (token_D1.sum() - token_D1))
    ratio_DE, factor_DE = inside_DE / outside_DE, (Z * (effect * variance_DE).sqrt()).exp()
    table_DE3 = torch.stack([ratio_DE, ratio_DE / factor_DE, ratio_DE * factor_DE], dim=2).tolist()
    return [
        Preference(expert, domain, *numbers)
        for domain, row in zip(by_domain, table_DE3, strict=True)
        for expert, numbers in enumerate(row)
    ]


def _removal_errors(sample: OutputSample) -> list[float] | None:
    if sample.routing is None:
        return None
    experts = range(sample.logits_TE.shape[1])
    found_E = subset_search.subset_losses(sample, [[e for e in experts if e != gone] for gone in experts])
    return found_E.tolist()


# --- verdicts -----------------------------------------------------------------------------------------------


def _warning(count_CE: Tensor, tokens: int, effect: float | None) -> str | None:
    """Why nothing is said of single experts, if the text does not do for it."""
    experts, routed = count_CE.shape[1], float(count_CE.sum())
    if routed < ROUTED * experts:
        needed = math.ceil(ROUTED * experts * max(tokens, 1) / max(routed, 1.0))
        return (
            f"only {routed / experts:.0f} routed tokens an expert: no expert is judged from {tokens} tokens; give at "
            f"least {needed}."
        )
    return (
        None if effect is not None else "the text is a single window, so no interval can be given: give more prompts."
    )


def _verdicts(
    shape: MoEShape,
    outputs_EE: Tensor,
    count_E: Tensor,
    share_E: Tensor,
    high_E: Tensor,
    preferences: Sequence[Preference],
    threshold: float,
) -> dict[str, Any]:
    special = {p.expert for p in preferences if p.low > SPECIALIST}
    uneven = {p.expert for p in preferences if p.low < 1 / GENERALIST or p.high > GENERALIST}
    at_least_average = set((share_E >= share_E.mean()).nonzero().flatten().tolist()) if preferences else set()
    cold = [e for e in range(shape.num_experts) if high_E[e] < COLD * share_E.mean() and e not in special]
    alike = [(i, j, float(outputs_EE[i, j])) for i, j in pairs(range(shape.num_experts))]
    groups: list[list[int]] = []
    removable = []
    for part in router_parts(shape):
        found = all_groups(outputs_EE, count_E, [e for e in part if e not in cold], threshold)
        removable.append(sum(len(group) - 1 for group in found) + sum(e in part for e in cold))
        groups += found
    reduction = min(min(removable) * shape.groups, shape.num_experts - shape.floor)
    return {
        "merge_candidates": sorted((pair for pair in alike if pair[2] > threshold), key=lambda pair: -pair[2]),
        "prune_candidates": cold,
        "specialist_experts": sorted(special),
        "generalist_experts": sorted(at_least_average - uneven),
        "mergeable_groups": groups,
        "potential_reduction": reduction,
        "max_compression_ratio": reduction / shape.num_experts,
        "recommended_target": shape.num_experts - reduction,
    }


def router_parts(shape: MoEShape) -> list[range]:
    """The experts of each router group; all of them where routing is not limited to groups."""
    size = shape.num_experts // shape.groups
    return [range(g * size, (g + 1) * size) for g in range(shape.groups)]
