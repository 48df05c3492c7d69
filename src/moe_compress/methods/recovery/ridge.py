"""A linear router fitted to logits in closed form. T tokens, D model width, E rows."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_step(input_TD: Tensor, residual_TE: Tensor, ridge: float, *, offset: bool) -> tuple[Tensor, Tensor | None]:
    """What is to be added to a router's rows [E, D], and to its bias [E] where it has one (`offset`), in float64.

    The least squares of the residual logits over the tokens, with `ridge` times the inputs' mean square on the squares
    of what is added: the router that is there is where it starts from.
    """
    x_TD, r_TE = input_TD.double(), residual_TE.double()
    if offset:
        x_TD = torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], 1)
    gram_DD, cross_DE = x_TD.T @ x_TD, x_TD.T @ r_TE
    width = input_TD.shape[1]
    weight = ridge * float(gram_DD.diagonal()[:width].mean())
    damped_DD = gram_DD.clone()
    damped_DD.diagonal()[:width] += max(weight, torch.finfo(torch.float64).tiny)
    solution_DE = torch.linalg.lstsq(damped_DD, cross_DE).solution
    return solution_DE[:width].T, solution_DE[width] if offset else None
