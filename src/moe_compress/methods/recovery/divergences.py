"""How far the student's next-token distribution is from the teacher's. P predicted tokens, V vocabulary."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from moe_compress.methods.recovery_method import Divergence

# Logits that are minus infinity (padding of a vocabulary, in some models) count as this, and their gradient is 0.
RULED_OUT = -1e30
Kind = Literal["forward", "reverse", "jsd"]


def forward_kl(student_PV: Tensor, teacher_PV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of logits at temperature T, [P] (Hinton et al., arXiv 1503.02531)."""
    s_PV, t_PV = _log_probabilities(student_PV, teacher_PV, temperature)
    return temperature**2 * _kl(t_PV, s_PV)


def reverse_kl(student_PV: Tensor, teacher_PV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher), [P]."""
    s_PV, t_PV = _log_probabilities(student_PV, teacher_PV, temperature)
    return temperature**2 * _kl(s_PV, t_PV)


def jensen_shannon(student_PV: Tensor, teacher_PV: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """T^2 times the generalised Jensen-Shannon divergence, [P] (GKD, arXiv 2306.13649).

    beta, between 0 and 1: the teacher's share of the mixture; divided by beta, it is the forward KL as beta nears 0.
    """
    s_PV, t_PV = _log_probabilities(student_PV, teacher_PV, temperature)
    mixed_PV = torch.logsumexp(torch.stack([t_PV + math.log(beta), s_PV + math.log1p(-beta)]), 0)
    return temperature**2 * (beta * _kl(t_PV, mixed_PV) + (1 - beta) * _kl(s_PV, mixed_PV))


def divergence_of(kind: Kind, temperature: float, beta: float) -> Divergence:
    """The one of that name. ValueError for a temperature or a beta that gives none."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature:g}: a number above 0 is needed.")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta={beta:g}: a number between 0 and 1 is needed.")
    if kind == "jsd":
        return functools.partial(jensen_shannon, temperature=temperature, beta=beta)
    return functools.partial(forward_kl if kind == "forward" else reverse_kl, temperature=temperature)


def _log_probabilities(student_PV: Tensor, teacher_PV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """In fp32 at least: sums over a vocabulary in bf16 are off by percents."""
    both = [each if each.dtype == torch.float64 else each.float() for each in (student_PV, teacher_PV)]
    s_PV, t_PV = ((each / temperature).clamp_min(RULED_OUT).log_softmax(-1) for each in both)
    return s_PV, t_PV


def _kl(this_PV: Tensor, other_PV: Tensor) -> Tensor:
    """Of log probabilities."""
    return (this_PV.exp() * (this_PV - other_PV)).sum(-1)
