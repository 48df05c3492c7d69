"""Which weights of a matrix go: those of lowest score, in rows, in whole matrices, or n:m.

B matrices at once, O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pattern_of(text: str) -> tuple[int, int] | None:
    """`2:4` as (2, 4): two of every four consecutive inputs of an output stay; None for no pattern.

    Raises ValueError for anything else.
    """
    if not text:
        return None
    kept, colon, group = text.partition(":")
    numbers = text.isascii() and kept.isdigit() and group.isdigit()
    if not colon or not numbers or not 0 < int(kept) < int(group):
        raise ValueError(f"pattern={text}: write how many weights stay of how many in a row, such as 2:4 or 4:8.")
    return int(kept), int(group)


def lowest_in_rows(score_BOI: Tensor, count_B: Tensor) -> Tensor:
    """True for the count_B[b] lowest scores of matrix b, equally many in every row (up to one more in the first)."""
    rows = score_BOI.shape[1]
    row_O = torch.arange(rows, device=score_BOI.device)
    count_BO = (count_B // rows)[:, None] + (row_O < (count_B % rows)[:, None])
    return lowest(score_BOI.flatten(0, 1), count_BO.flatten()).view_as(score_BOI)


def lowest(score_BN: Tensor, count_B: Tensor) -> Tensor:
    """True for exactly count_B[b] entries of row b, those of lowest score; of equal ones the first."""
    limit_B = _smallest(score_BN, count_B).unsqueeze(1)
    gone_BN, tied_BN = score_BN < limit_B, score_BN == limit_B
    missing_B = count_B - gone_BN.sum(1)
    if not torch.equal(tied_BN.sum(1), missing_B):
        tied_BN &= tied_BN.cumsum(1) <= missing_B.unsqueeze(1)
    return gone_BN | tied_BN


def _smallest(score_BN: Tensor, count_B: Tensor) -> Tensor:
    """The count_B[b]-th smallest entry of row b; minus infinity for a count of 0."""
    place_B = (count_B - 1).clamp_min(0)
    if score_BN.is_cuda:
        found_B = score_BN.sort(dim=1).values.gather(1, place_B.unsqueeze(1)).squeeze(1)
    else:  # numpy's selection is ten times as fast as torch's
        places = zip(score_BN.numpy(), place_B.tolist(), strict=True)
        found_B = torch.tensor([float(np.partition(row, place)[place]) for row, place in places], dtype=score_BN.dtype)
    return torch.where(count_B > 0, found_B, -torch.inf)


def lowest_in_groups(score_BOI: Tensor, kept: int, group: int) -> Tensor:
    """True for all but the `kept` highest scores of every `group` consecutive inputs."""
    score_BOGM = score_BOI.unflatten(2, (-1, group))
    order_BOGM = score_BOGM.argsort(dim=3, stable=True)
    gone_BOGM = torch.zeros_like(score_BOGM, dtype=torch.bool)
    return gone_BOGM.scatter_(3, order_BOGM[..., : group - kept], True).flatten(2)
