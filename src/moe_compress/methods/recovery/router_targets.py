"""What the teacher's router says of the student's experts.

T tokens, R rows of the teacher's router, E of the student's.

Of experts that were merged the teacher's masses add up; those of experts that are gone go to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Scores = Literal["softmax", "sigmoid"]


def mapped_logits(teacher_TR: Tensor, place_R: Sequence[int], rows: int, scores: Scores) -> Tensor:
    """The teacher's logits as those of the student's router, [T, E].

    place_R: of each of the teacher's rows, the student's that it is now or has gone into, -1 for one that is gone.
    Of several rows that went into one: the logit of their summed probability, or of the mean of their sigmoids.
    """
    place = torch.tensor(list(place_R), device=teacher_TR.device)
    if len(place) == rows and bool((place == torch.arange(rows, device=place.device)).all()):
        return teacher_TR
    members = [(place == row).nonzero().flatten() for row in range(rows)]
    return torch.stack([_joined(teacher_TR[:, each], scores) for each in members], 1)


def _joined(logits_TM: Tensor, scores: Scores) -> Tensor:
    if logits_TM.shape[1] == 1:
        return logits_TM[:, 0]
    if scores == "softmax":
        return logits_TM.logsumexp(1)
    return torch.logit(logits_TM.sigmoid().mean(1), eps=torch.finfo(logits_TM.dtype).eps)


def router_kl(student_TE: Tensor, teacher_TE: Tensor, scores: Scores) -> Tensor:
    """KL of the student's routing from the teacher's by token, [T]: of one choice, or summed over one of each expert.

    Routers that score by sigmoids give every expert a probability of its own (DeepSeek-V3).
    """
    if scores == "softmax":
        s_TE, t_TE = student_TE.log_softmax(-1), teacher_TE.log_softmax(-1)
        return (t_TE.exp() * (t_TE - s_TE)).sum(-1)
    on_TE = teacher_TE.sigmoid() * (logsigmoid(teacher_TE) - logsigmoid(student_TE))
    off_TE = (-teacher_TE).sigmoid() * (logsigmoid(-teacher_TE) - logsigmoid(-student_TE))
    return (on_TE + off_TE).sum(-1)
