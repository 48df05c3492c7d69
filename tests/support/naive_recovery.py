"""Losses of recovery from their papers' formulas, in float64, one token and one entry at a time. Nothing is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities at a temperature."""
    largest = max(logits)
    exps = [math.exp((each - largest) / temperature) for each in logits]
    return [each / sum(exps) for each in exps]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q)."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(kind: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.5) -> float:
    """Of one token's logits: Hinton et al.'s KL times T^2, its reverse, or GKD's generalised Jensen-Shannon."""
    q, p = (softmax(each.tolist(), temperature) for each in (student, teacher))
    if kind == "forward":
        return temperature**2 * kl(p, q)
    if kind == "reverse":
        return temperature**2 * kl(q, p)
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return temperature**2 * (beta * kl(p, mixed) + (1 - beta) * kl(q, mixed))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def routing(teacher: Tensor, place: Sequence[int], rows: int, scores: str) -> list[float]:
    """What the teacher's router says of the student's rows for one token.

    Probabilities: of merged experts added up, of dropped ones shared out by the others'; of sigmoids: the means.
    """
    given = softmax(teacher.tolist()) if scores == "softmax" else [sigmoid(each) for each in teacher.tolist()]
    members = [[given[old] for old, new in enumerate(place) if new == row] for row in range(rows)]
    if scores == "sigmoid":
        return [sum(each) / len(each) for each in members]
    masses = [sum(each) for each in members]
    return [each / sum(masses) for each in masses]


def router_kl(student: Tensor, wanted: Sequence[float], scores: str) -> float:
    """KL of one token's routing: of one choice, or summed over one of each expert."""
    if scores == "softmax":
        return kl(wanted, softmax(student.tolist()))
    given = [sigmoid(each) for each in student.tolist()]
    return sum(kl([p, 1 - p], [q, 1 - q]) for p, q in zip(wanted, given, strict=True))


def hidden_error(student: Tensor, teacher: Tensor) -> float:
    """Squared error of one token's hidden state over the square of what it should be."""
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / sum(b * b for _, b in pairs)


def coded_gradients(
    x_RI: Tensor, gradient_RO: Tensor, codes_OI: Tensor, scale_OG: Tensor, latent_OI: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of scales [O, G], and of what is behind codes [O, I], of rows through clamp(round(latent / s)) * s.

    Codes count as constant for scales; rounding passes gradients, and clipping stops them.
    """
    (outputs, inputs), groups, half = codes_OI.shape, scale_OG.shape[1], 2 ** (bits - 1)
    scale, latent = (scale_OG.new_zeros(size, dtype=torch.float64) for size in (scale_OG.shape, codes_OI.shape))
    for o in range(outputs):
        for i in range(inputs):
            g = i * groups // inputs
            code, inside = float(codes_OI[o, i]), True
            if latent_OI is not None:
                real = float(latent_OI[o, i] / scale_OG[o, g])
                inside = -half <= real <= half - 1
                code = min(max(round(real), -half), half - 1)
            of_weight = sum(float(gradient_RO[r, o]) * float(x_RI[r, i]) for r in range(len(x_RI)))
            scale[o, g] += of_weight * code
            latent[o, i] = of_weight if inside else 0.0
    return scale, latent
