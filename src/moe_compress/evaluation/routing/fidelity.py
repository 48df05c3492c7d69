"""Whether a compressed model still routes as the original does, layer by layer.

Two ways to ask, never mixed: *free-running*, each model on its own hidden states, where changes add up, and
*teacher-forced*, both layers on the original's, where its own changes alone count.
T sampled tokens, E experts of the original, F of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_compress.calibration.router_choices import RouterChoices
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import Windows
from moe_compress.edits.ancestry import Ancestry
from moe_compress.engine.forward import Progress, embed_windows, run_batches
from moe_compress.engine.layers import Layers
from moe_compress.engine.observer import evenly_T
from moe_compress.evaluation import statistics
from moe_compress.models.families import Family, family_of
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, by_expert

SAMPLE = 4096
# None of n tokens: with 95 % confidence fewer than 3 / n of all.
RULE_OF_THREE = 3.0
TINY = 1e-12
Sample = Mapping[str, Tensor]
Samples = Mapping[int, Sample]
SUMMED = ("overlap", "flips", "kl")


class RoutingSample(RouterChoices):
    """What a router did: `used` bool [T, E] and `probability` [T, E] of a sample; `count` [E] and `tokens` of all."""

    def __init__(self, family: Family, windows: Windows) -> None:
        super().__init__(family, windows.tokens, SAMPLE)

    def start(self, view: MoEView) -> None:
        """Begin a layer."""
        super().start(view)
        self.count_E = torch.zeros(view.num_experts, dtype=torch.float64)

    def rows(self, rows: RoutedRows) -> None:
        """Count every real token as well."""
        super().rows(rows)
        expert_R = rows.expert_R[self.real_T[rows.token_R]]
        self.count_E += torch.bincount(expert_R, minlength=self.experts).double().cpu()

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer's sample; rows of one expert together, without those of constants."""
        super().finish(view)
        used_TE, probability_TE = self.found["used"].cpu(), by_expert(self.found["probability"], view).float().cpu()
        tokens = torch.tensor(float(self.tokens), dtype=torch.float64)
        return {"used": used_TE, "probability": probability_TE, "count": self.count_E, "tokens": tokens}


@dataclass(frozen=True)
class Fidelity:
    """How two models' routing differs: by layer of the compressed one, and in all layers together (with intervals)."""

    layers: dict[int, dict[str, Any]]
    together: dict[str, statistics.Metric]


def fidelity(before: Samples, after: Samples, ancestry: Ancestry, windows: Windows) -> Fidelity:
    """Compare samples of the same tokens, by layer of each model."""
    document_T = sampled_documents(windows)
    layers: dict[int, dict[str, Any]] = {}
    totals: dict[str, Tensor] = {}
    for index, sample in after.items():
        source = ancestry.source[index]
        if source not in before or not sample:
            continue
        per_token = token_values(before[source], sample, ancestry.place[index])
        layers[index] = {
            "source": source,
            **_layer(before[source], sample, ancestry.place[index], per_token, document_T),
        }
        for name in SUMMED:
            totals[name] = totals.get(name, torch.zeros_like(per_token[name])) + per_token[name]
    if not layers:
        raise ValueError("the two models have no layer with experts in common.")
    together = {name: _by_document(total / len(layers), document_T, UNITS[name]) for name, total in totals.items()}
    return Fidelity(layers, together)


UNITS = {"overlap": "fraction", "flips": "fraction", "kl": "nats", "lost": "fraction"}


def sampled_documents(windows: Windows) -> Tensor:
    """Which document each token of a sample is from."""
    total = windows.tokens
    chosen = evenly_T(0, total, min(SAMPLE, total), total, torch.device("cpu"))
    return windows.document_NS[windows.counted_NS][chosen]


def token_values(before: Sample, after: Sample, place: Sequence[int]) -> dict[str, Tensor]:
    """Per token, float64 [T].

    overlap: experts that both use over all that either uses (Jaccard; experts that are gone are in the original's
    set alone); flips: 1 where the sets differ; kl: of the other's router distribution from the original's, which is
    shared out anew among experts that are still there; lost: what the original gave to those that are not.
    """
    to_EF = _map(place, after["used"].shape[1])
    mapped_TF = (before["used"].double() @ to_EF) > 0
    gone_T = before["used"][:, [e for e, p in enumerate(place) if p < 0]].sum(1).double()
    both_T = (mapped_TF & after["used"]).sum(1).double()
    either_T = (mapped_TF | after["used"]).sum(1).double() + gone_T
    old_TF, new_TF = before["probability"].double() @ to_EF, after["probability"].double()
    lost_T = (before["probability"].double().sum(1) - old_TF.sum(1)).clamp(0, 1)
    old_TF, new_TF = (each / each.sum(1, keepdim=True).clamp_min(TINY) for each in (old_TF, new_TF))
    ratio_TF = old_TF.clamp_min(TINY) / new_TF.clamp_min(TINY)
    return {
        "overlap": both_T / either_T.clamp_min(1),
        "flips": (both_T != either_T).double(),
        "kl": (old_TF * ratio_TF.log()).sum(1).clamp_min(0),
        "lost": lost_T,
    }


def _map(place: Sequence[int], experts: int) -> Tensor:
    to_EF = torch.zeros(len(place), experts, dtype=torch.float64)
    for old, new in enumerate(place):
        if new >= 0:
            to_EF[old, new] = 1
    return to_EF


def _layer(
    before: Sample, after: Sample, place: Sequence[int], per_token: Mapping[str, Tensor], document_T: Tensor
) -> dict[str, Any]:
    """One layer: means over tokens with intervals over documents; utilisation of all tokens, before and after."""
    found: dict[str, Any] = {name: _by_document(per_token[name], document_T, unit) for name, unit in UNITS.items()}
    share_E, share_F = (each["count"] / each["count"].sum().clamp_min(1) for each in (before, after))
    mapped_F = share_E @ _map(place, len(share_F))
    found["utilisation_shift"] = float(((mapped_F - share_F).abs().sum() + 1 - mapped_F.sum()) / 2)
    for name, sample in (("before", before), ("after", after)):
        found[name] = utilisation(sample["count"], len(document_T.unique()))
    return found


def utilisation(count_E: Tensor, documents: int) -> dict[str, Any]:
    """How evenly experts are used.

    cv: standard deviation over mean of the tokens per expert; busiest: largest over mean; dead: without a token;
    dead_below: the share of documents below which each of those is used, with 95 % confidence; tokens of one document
    are too much alike to count for themselves.
    """
    mean = float(count_E.mean())
    return {
        "cv": float(count_E.std(correction=0)) / mean if mean else 0.0,
        "busiest": float(count_E.max()) / mean if mean else 0.0,
        "dead": (count_E == 0).nonzero().flatten().tolist(),
        "dead_below": RULE_OF_THREE / max(documents, 1),
    }


def _by_document(value_T: Tensor, document_T: Tensor, unit: str) -> statistics.Metric:
    count = int(document_T.max()) + 1
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, document_T, value_T)
    tokens = torch.bincount(document_T, minlength=count)
    there = tokens > 0
    return statistics.per_token(totals[there].numpy(), tokens[there].numpy().astype(np.float64), unit)


# --- the same inputs ----------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_forced(
    original: Layers, other: Layers, ancestry: Ancestry, windows: Windows, progress: Progress | None = None
) -> tuple[dict[int, Sample], dict[int, Sample]]:
    """Samples by layer of the original and of the other, each layer of which runs on what enters its ancestor."""
    batches, stream = embed_windows(original, windows)
    theirs, _ = embed_windows(other, windows)
    before: dict[int, Sample] = {}
    after: dict[int, Sample] = {}
    descendants = {source: index for index, source in enumerate(ancestry.source)}
    count = len(batches[0].calls)
    for index in range(count):
        if index in descendants:
            number = descendants[index]
            with other.layer(number) as layer:
                watch = RoutingSample(family_of(other.model.config), windows)
                (after[number],) = run_batches(number, layer, stream, theirs, [watch], go_on=False)
        with original.layer(index) as layer:
            watch = RoutingSample(family_of(original.model.config), windows)
            (before[index],) = run_batches(index, layer, stream, batches, [watch], go_on=True)
        if progress is not None:
            progress(index + 1, count)
    return _with_experts(before), _with_experts(after)


def free_running(seen: Sequence[Sequence[Sample]]) -> dict[int, Sample]:
    """Samples by layer of what a fold's first observer saw."""
    return _with_experts(dict(enumerate(layer[0] for layer in seen)))


def save(path: Path, samples: Samples) -> None:
    """Keep samples; written whole or not at all."""
    write_shard(
        path, {f"{index}.{name}": tensor for index, sample in samples.items() for name, tensor in sample.items()}
    )


def load(path: Path) -> dict[int, Sample]:
    """Read them back."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, _, name = key.partition(".")
        found.setdefault(int(index), {})[name] = tensor
    return dict(found)


def _with_experts(samples: Samples) -> dict[int, Sample]:
    return {index: sample for index, sample in samples.items() if sample}
