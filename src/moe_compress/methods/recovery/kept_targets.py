"""What is kept of a teacher's next-token distributions, and losses towards that: a few ids stand for a vocabulary.

topk: the k likeliest tokens, and what all others have together, so that a loss compares k + 1 probabilities: less than
the loss over the vocabulary, by what is within the others. sampled: the k / 2 likeliest, and as many drawn from the
others, whose mean stands for them: the KL of the whole vocabulary without bias (after Sparse Logit Sampling, arXiv
2503.16870, which draws them all). P predicted tokens, V vocabulary, K ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moe_compress.methods.recovery.divergences import Kind, divergence_of
from moe_compress.methods.recovery_method import Distillation, Keeping, TeacherBits, Term

Cache = Literal["none", "topk", "sampled"]
IDS, LOG_P, LOG_REST = "ids", "log_p", "log_rest"
# Log probabilities that fp16 holds; whatever is less likely never occurs.
LEAST = -6e4


def keeping_of(cache: Cache, top: int, divergence: Kind, temperature: float, beta: float) -> Keeping | None:
    """How that much is kept, and the loss towards it; None for cache=none. ValueError for no ids."""
    if cache == "none":
        return None
    if top < 1:
        raise ValueError(f"top={top}: at least 1 token is needed of every distribution.")
    said = {"kind": cache, "top": top, "temperature": temperature}
    if cache == "sampled":
        return Keeping(
            said=said,
            keep=lambda logits_PV, generator: sampled_targets(logits_PV, top, temperature, generator),
            divergence=lambda student_PV, kept: sampled_kl(student_PV, kept, temperature),
            disagreement=lambda teacher_PV, kept: sampled_kl(teacher_PV, kept, temperature),
        )
    return Keeping(
        said=said,
        keep=lambda logits_PV, _: top_targets(logits_PV, top, temperature),
        divergence=lambda student_PV, kept: bucket_divergence(student_PV, kept, divergence, temperature, beta),
        disagreement=lambda teacher_PV, kept: bucket_divergence(teacher_PV, kept, "forward", temperature),
    )


def towards_teacher(
    trains: frozenset[str],
    terms: Mapping[Term, float],
    *,
    divergence: Kind = "forward",
    temperature: float,
    beta: float = 0.5,
    cache: Cache,
    top: int,
    teacher_bits: TeacherBits,
) -> Distillation:
    """Distillation of some parts, in the words of a recipe. ValueError for words of which no loss could be made."""
    return Distillation(
        trains=trains,
        terms=terms,
        divergence=divergence_of(divergence, temperature, beta),
        keeping=keeping_of(cache, top, divergence, temperature, beta),
        teacher_bits=int(teacher_bits),
    )


def top_targets(logits_PV: Tensor, top: int, temperature: float) -> dict[str, Tensor]:
    """The likeliest ids [P, K], their log probabilities, and that of all others together, in 6 K + 2 bytes at most."""
    log_PV = _log_probabilities(logits_PV, temperature)
    log_p_PK, id_PK = log_PV.topk(top)
    rest_P = log_PV.scatter(1, id_PK, -torch.inf).logsumexp(1)
    return {IDS: _narrow(id_PK, log_PV.shape[1]), LOG_P: _half(log_p_PK), LOG_REST: _half(rest_P)}


def bucket_divergence(
    student_PV: Tensor, kept: Mapping[str, Tensor], kind: Kind, temperature: float, beta: float = 0.5
) -> Tensor:
    """The divergence of K + 1 probabilities, [P]: of the ids that are kept, and of all others together.

    Never more than that of the whole vocabulary, and nothing where that is nothing.
    """
    z_PV, id_PK = _at(student_PV, temperature), kept[IDS].long()
    # What is left is summed up itself: 1 less the others would be rounding errors where it is little.
    rest_P1 = z_PV.scatter(1, id_PK, -torch.inf).logsumexp(1, keepdim=True)
    ours_PB = torch.cat([z_PV.gather(1, id_PK), rest_P1], 1)
    theirs_PB = torch.cat([kept[LOG_P], kept[LOG_REST].unsqueeze(1)], 1).to(ours_PB.dtype)
    return temperature**2 * divergence_of(kind, 1.0, beta)(ours_PB, theirs_PB)


def sampled_targets(logits_PV: Tensor, top: int, temperature: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The same with the likeliest in the first half of the ids, and draws from the others, with replacement, behind."""
    log_PV = _log_probabilities(logits_PV, temperature)
    log_p_PH, id_PH = log_PV.topk(top // 2)
    others_PV = log_PV.scatter(1, id_PH, -torch.inf)
    drawn_PD = torch.multinomial(others_PV.softmax(1), top - top // 2, replacement=True, generator=generator)
    id_PK, log_p_PK = torch.cat([id_PH, drawn_PD], 1), torch.cat([log_p_PH, log_PV.gather(1, drawn_PD)], 1)
    rest_P = others_PV.logsumexp(1)
    return {IDS: _narrow(id_PK, log_PV.shape[1]), LOG_P: _half(log_p_PK), LOG_REST: _half(rest_P)}


def sampled_kl(student_PV: Tensor, kept: Mapping[str, Tensor], temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the whole vocabulary as the draws estimate it, [P]; may be below 0 for a token."""
    z_PV, id_PK = _at(student_PV, temperature), kept[IDS].long()
    likelihood_PK = z_PV.gather(1, id_PK) - z_PV.logsumexp(1, keepdim=True)
    log_p_PK, half = kept[LOG_P].to(z_PV.dtype), id_PK.shape[1] // 2
    drawn = id_PK.shape[1] - half
    each_P1 = kept[LOG_REST].to(z_PV.dtype).unsqueeze(1) - math.log(drawn)
    # Rounded as they are stored, weights would not add up to 1.
    weight_PK = torch.cat([log_p_PK[:, :half], each_P1.expand(-1, drawn)], 1).softmax(1)
    return temperature**2 * (weight_PK * (log_p_PK - likelihood_PK)).sum(1)


def _log_probabilities(logits_PV: Tensor, temperature: float) -> Tensor:
    return _at(logits_PV, temperature).log_softmax(-1)


def _at(logits_PV: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature, in fp32 at least: sums over a vocabulary in bf16 are off by percents."""
    wide_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    return wide_PV if temperature == 1.0 else wide_PV / temperature


def _narrow(id_PK: Tensor, vocabulary: int) -> Tensor:
    """Ids in as few bytes as they fit into."""
    return id_PK.to(torch.int16 if vocabulary <= 1 + torch.iinfo(torch.int16).max else torch.int32)


def _half(log_p: Tensor) -> Tensor:
    return log_p.clamp_min(LEAST).half()
