"""Structure wrapper: one core between two low-rank changes of coordinates, (I + Uo Vo') C (I + Ui Vi').

The exact form of this project's founding document. It is C plus a matrix of rank 2r at the same number of parameters,
so base_delta of rank 2r holds it and more; it is solved for comparison, and stored as that core and rank.
E experts, O outputs, I inputs, r a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.methods.factorisation.base_delta import shared_mean
from moe_compress.methods.factorisation.conjugate_gradients import conjugate_gradients
from moe_compress.methods.factorisation.low_rank import truncated
from moe_compress.methods.factorisation.settings import Settings
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.methods.factorisation.whitening import Metric, Metrics
from moe_compress.methods.factorisation.wrapper_adam import descended

CG_STEPS = 8
# Singular values of a wrapped core below this share of the largest are none: the wrapper there is anything.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Wrapper:
    """P = I + out_left out_right and Q = I + in_left in_right, which stand around the core for one expert.

    out_left: [O, r]; out_right: [r, O]; in_left: [I, r]; in_right: [r, I].
    """

    out_left: Tensor
    out_right: Tensor
    in_left: Tensor
    in_right: Tensor

    def outside(self, matrix_OI: Tensor) -> Tensor:
        """P M."""
        return matrix_OI + self.out_left @ (self.out_right @ matrix_OI)

    def outside_transposed(self, matrix_OI: Tensor) -> Tensor:
        """P' M."""
        return matrix_OI + self.out_right.T @ (self.out_left.T @ matrix_OI)

    def inside(self, matrix_OI: Tensor) -> Tensor:
        """M Q."""
        return matrix_OI + (matrix_OI @ self.in_left) @ self.in_right

    def inside_transposed(self, matrix_OI: Tensor) -> Tensor:
        """M Q'."""
        return matrix_OI + (matrix_OI @ self.in_right.T) @ self.in_left.T

    def around(self, core_OI: Tensor) -> Tensor:
        """P C Q."""
        return self.outside(self.inside(core_OI))

    def stored(self, core_OI: Tensor) -> tuple[Tensor, Tensor]:
        """(left [O, 2r], right [2r, I]) whose product is P C Q - C.

        The two wrappers may be large and cancel: with orthonormal columns on the left nothing does, and both sides can
        be stored in few bits.
        """
        left = torch.cat([self.outside(core_OI @ self.in_left), self.out_left], 1).double()
        right = torch.cat([self.in_right, self.out_right @ core_OI], 0).double()
        if left.shape[1] > left.shape[0]:
            return left, right
        orthonormal, within = torch.linalg.qr(left)
        return orthonormal, within @ right


def solve_wrapper(weight_EOI: Tensor, metrics: Metrics, size: Size, settings: Settings) -> tuple[Factors, list[float]]:
    """By alternating least squares, or as the document has it (solver=adam), whose losses may rise in between."""
    if settings.solver == "adam":
        core_OI, parts, losses = descended(weight_EOI, metrics, size.rank, settings)
        wrappers = [Wrapper(*part) for part in zip(*parts, strict=True)]
    else:
        core_OI, wrappers, losses = alternated(weight_EOI, metrics, size.rank, settings.sweeps)
    stored = [wrapper.stored(core_OI) for wrapper in wrappers]
    left, right = ([one[side].float() for one in stored] for side in (0, 1))
    return Factors(left=left, right=right, core=core_OI.float()), losses


def alternated(
    weight_EOI: Tensor, metrics: Metrics, rank: int, sweeps: int
) -> tuple[Tensor, list[Wrapper], list[float]]:
    """(core, wrappers, the loss after each sweep, which never rises), from no wrappers and the best core without any.

    A sweep fits the inner wrappers, the outer ones, and (from the second on, before them) the core. All in float64:
    where experts have little in common the core is small and its wrappers are large.
    """
    metrics = Metrics(metrics.grams, weight_EOI, torch.float64)
    core_OI = shared_mean(weight_EOI, metrics)
    wrappers = [_identity(core_OI, rank) for _ in weight_EOI]
    losses: list[float] = []
    for sweep in range(sweeps):
        if sweep:
            core_OI = core_OI + _core_step(weight_EOI, metrics, core_OI, wrappers)
        loss = 0.0
        for e, wrapper in enumerate(wrappers):
            wrappers[e], lost = _fitted(weight_EOI[e].double(), metrics[e], core_OI, wrapper)
            loss += lost
        losses.append(loss)
    return core_OI, wrappers, losses


def _identity(core_OI: Tensor, rank: int) -> Wrapper:
    outputs, inputs = core_OI.shape
    zeros = core_OI.new_zeros
    return Wrapper(zeros(outputs, rank), zeros(rank, outputs), zeros(inputs, rank), zeros(rank, inputs))


def _fitted(weight_OI: Tensor, metric: Metric, core_OI: Tensor, wrapper: Wrapper) -> tuple[Wrapper, float]:
    """(the wrapper with its inner, then its outer side refitted, its loss); a step that loses is not taken."""
    loss = metric.squared(weight_OI - wrapper.around(core_OI))
    for fit in (_inner, _outer):
        new = fit(weight_OI, metric, core_OI, wrapper)
        lost = metric.squared(weight_OI - new.around(core_OI))
        if lost < loss:
            wrapper, loss = new, lost
    return wrapper, loss


def _inner(weight_OI: Tensor, metric: Metric, core_OI: Tensor, wrapper: Wrapper) -> Wrapper:
    """The best Ui Vi' for N = P C: reduced-rank regression of W - N on N, in the columns that N reaches."""
    around_OI = wrapper.outside(core_OI)
    reached_Op, back_Ip = _column_space(around_OI)
    left_pr, right_rI = _truncated(reached_Op.T @ (weight_OI - around_OI), len(wrapper.in_right), metric)
    return Wrapper(wrapper.out_left, wrapper.out_right, back_Ip @ left_pr, right_rI)


def _outer(weight_OI: Tensor, metric: Metric, core_OI: Tensor, wrapper: Wrapper) -> Wrapper:
    """The best Uo Vo' for Z = C Q: reduced-rank regression of (W - Z) L on Z L, in the rows that Z L reaches."""
    within_OI = wrapper.inside(core_OI)
    white_OI = metric.whiten(within_OI)
    reached_Op, back_Ip = _column_space(white_OI)
    left_Op = metric.whiten(weight_OI - within_OI) @ back_Ip
    left_Or, right_rI = _truncated(left_Op @ (reached_Op.T @ white_OI), len(wrapper.out_right), Metric(None))
    return Wrapper(left_Or, (right_rI @ back_Ip) @ reached_Op.T, wrapper.in_left, wrapper.in_right)


def _truncated(matrix_OI: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """As `truncated`, with zeros for ranks that the matrix is too small to have."""
    reached = min(rank, *matrix_OI.shape)
    left_Or, right_rI = truncated(matrix_OI, reached, metric)
    pad = torch.nn.functional.pad
    return pad(left_Or, (0, rank - reached)), pad(right_rI, (0, 0, 0, rank - reached))


def _column_space(matrix_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal columns [O, p] that a matrix reaches, its pseudo-inverse times them [I, p]), from the small Gram."""
    wide = matrix_OI.shape[0] <= matrix_OI.shape[1]
    value, vector = torch.linalg.eigh(matrix_OI @ matrix_OI.T if wide else matrix_OI.T @ matrix_OI)
    reached = value > RANK_TOLERANCE**2 * value[-1]
    value, vector = value[reached], vector[:, reached]
    if wide:
        return vector, matrix_OI.T @ vector / value
    return matrix_OI @ vector / value.sqrt(), vector / value.sqrt()


def _core_step(weight_EOI: Tensor, metrics: Metrics, core_OI: Tensor, wrappers: list[Wrapper]) -> Tensor:
    """What to add to the core: conjugate gradients on sum P'P X Q H Q', conditioned by the pooled Gram."""

    def pulled(apply: Callable[[int, Wrapper], Tensor]) -> Tensor:
        total_OI = torch.zeros_like(core_OI)
        for e, wrapper in enumerate(wrappers):
            weighed_OI = metrics[e].times(apply(e, wrapper))
            total_OI += wrapper.outside_transposed(wrapper.inside_transposed(weighed_OI))
        return total_OI

    right_OI = pulled(lambda e, wrapper: weight_EOI[e].double() - wrapper.around(core_OI))

    def operator(step_OI: Tensor) -> Tensor:
        return pulled(lambda _, wrapper: wrapper.around(step_OI))

    return conjugate_gradients(operator, right_OI, metrics.pooled.divide, CG_STEPS)
