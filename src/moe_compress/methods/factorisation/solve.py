"""One door to all structures: the factors of a projection, and how far they are from its experts.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compress.methods.factorisation.base_delta import solve_base_delta
from moe_compress.methods.factorisation.basis_mixture import solve_basis_mixture
from moe_compress.methods.factorisation.low_rank import solve_svd
from moe_compress.methods.factorisation.settings import Settings, Solver
from moe_compress.methods.factorisation.shared_basis import solve_shared_basis
from moe_compress.methods.factorisation.sizes import OWN_RANKS, Size, largest_rank
from moe_compress.methods.factorisation.sparse_low_rank import solve_sparse_low_rank
from moe_compress.methods.factorisation.structures import ACTIVATIONS, STRUCTURES, Activation, Factors, Grams
from moe_compress.methods.factorisation.whitening import Metric, Metrics, full_precision, working_dtype
from moe_compress.methods.factorisation.wrapper import solve_wrapper

SOLVERS: dict[str, Callable[[Tensor, Metrics, Size, Settings], tuple[Factors, list[float]]]] = {
    "svd": solve_svd,
    "base_delta": solve_base_delta,
    "shared_basis": solve_shared_basis,
    "basis_mixture": solve_basis_mixture,
    "wrapper": solve_wrapper,
    "sparse_low_rank": solve_sparse_low_rank,
}


@torch.no_grad()
def solve(
    structure: str,
    weight_EOI: Tensor,
    grams: Grams | None,
    size: Size,
    *,
    sweeps: int = 4,
    activation: Activation = "linear",
    solver: Solver = "als",
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> tuple[Factors, list[float]]:
    """(fp32 factors, the loss sum tr((W_e - W'_e) H_e (W_e - W'_e)') after each sweep, which never rises).

    grams: H_e, or None for plain distance; read one expert at a time. activation: of mixed bases; solver: of the
    wrapper; seed: of either's start; steps, lr: of the two that take gradient steps, whose losses may rise in between.
    Raises ValueError for numbers that are not finite, and for a size that is not one of these matrices.
    """
    if structure not in SOLVERS:
        raise ValueError(f"structure={structure}: allowed: {', '.join(STRUCTURES)}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation}: allowed: {', '.join(ACTIVATIONS)}.")
    if sweeps < 1:
        raise ValueError(f"sweeps={sweeps}: at least one is needed.")
    if not bool(weight_EOI.isfinite().all()):
        raise ValueError("the experts' weights hold NaN or infinity.")
    _require_size(structure, size, weight_EOI)
    settings = Settings(sweeps=sweeps, activation=activation, solver=solver, steps=steps, lr=lr, seed=seed)
    with full_precision():
        return SOLVERS[structure](weight_EOI, Metrics(grams, weight_EOI), size, settings)


@torch.no_grad()
def errors(
    weight_EOI: Tensor, factors: Factors, grams: Grams | None, left_grams: Grams | None = None
) -> tuple[float, float]:
    """(plain, whitened) squared errors of all experts together, as shares of the originals' own squares.

    left_grams: G_e [O, O], which make the whitened one of sum tr(G_e D H_e D'). Without Grams, or where no expert saw
    anything, both are the plain one; experts that are all zero have error 0. Grams have the ridge with which they are
    solved: of fewer tokens than inputs they say nothing of most directions, and rounding may make them less than that.
    """
    plain, white, dtype = [0.0, 0.0], [0.0, 0.0], working_dtype(weight_EOI)
    with full_precision():
        metrics = Metrics(grams, weight_EOI)
        for e in range(len(weight_EOI)):
            weight_OI = weight_EOI[e].to(dtype)
            error_OI = weight_OI - factors.expert(e).to(dtype)
            left_OO = None if left_grams is None else left_grams[e].to(weight_OI)
            for sums, metric, left in ((plain, Metric(None), None), (white, metrics[e], left_OO)):
                sums[0] += metric.squared(error_OI, left)
                sums[1] += metric.squared(weight_OI, left)
    share = plain[0] / plain[1] if plain[1] else 0.0
    return share, max(white[0], 0.0) / white[1] if white[1] > 0 else share


def _require_size(structure: str, size: Size, weight_EOI: Tensor) -> None:
    experts, outputs, inputs = weight_EOI.shape
    name = f"structure={structure} of {experts} experts {outputs} x {inputs}"
    if structure in OWN_RANKS:
        smaller = min(outputs, inputs)
        if len(size.ranks) != experts or not all(0 <= rank <= smaller for rank in size.ranks):
            raise ValueError(f"{name} needs a rank of 0..{smaller} for each: ranks={size.ranks}.")
        return
    most = largest_rank(structure, experts, outputs, inputs, size.side)
    if not 1 <= size.rank <= most:
        raise ValueError(f"{name} needs a rank of 1..{most}: rank={size.rank}.")
