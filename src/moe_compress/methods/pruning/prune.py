"""Weight pruning: which weights of experts (or of other parts of a layer) become zero.

`magnitude` by |w|, lowest of the whole matrix; `wanda` (arXiv 2306.11695) by |w| times the norm of its input, lowest of
each row; `sparsegpt` (arXiv 2301.00774) by what the loss of a weight costs once the others have made up for it. Inputs
are those of the tokens that were routed to an expert. B experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.methods.pruning.masks import lowest, lowest_in_groups, lowest_in_rows, pattern_of
from moe_compress.methods.pruning.sparsegpt import sparsegpt
from moe_compress.methods.registry import Need, weight_method
from moe_compress.methods.sparsity_allocation import Allocation, require_allocatable
from moe_compress.methods.weight_method import MatrixGroup, NewMatrices
from moe_compress.models.matrices import Matrix, kinds_of

Way = Literal["magnitude", "wanda", "sparsegpt"]
NEEDS: dict[str, Need] = {"magnitude": "nothing", "wanda": "input_squares", "sparsegpt": "input_grams"}


def _needs(parameters: Mapping[str, Any]) -> Need:
    need = NEEDS[parameters["method"]]
    text = parameters["allocate"] != "uniform" or "router" in kinds_of(parameters["where"], parameters["spare"])
    return "input_squares" if need == "nothing" and text else need


def check_prune(
    layers: Mapping[int, Sequence[Matrix]],
    *,
    sparsity: float | None,
    pattern: str | None,
    allocate: Allocation,
    spread: float,
    unseen: str,
    **_: Any,
) -> None:
    """Raise ValueError for a sparsity, a pattern or an allocation that these matrices cannot have."""
    kept = pattern_of(pattern or "")
    if kept is None and (sparsity is None or not 0 <= sparsity < 1):
        raise ValueError(f"sparsity={sparsity}: the fraction of weights that become zero is in [0, 1).")
    if allocate != "uniform" and unseen == "dense":
        raise ValueError(
            f"allocate={allocate} keeps a budget, which unseen=dense would break: use pooled or magnitude."
        )
    if kept is None:
        _require_zeros(layers, sparsity or 0.0)
    if allocate != "uniform":
        require_allocatable(layers, allocate, sparsity, spread)
    for layer, matrices in layers.items():
        for matrix in matrices:
            inputs = matrix.weight_BOI.shape[2]
            if kept and inputs % kept[1]:
                raise ValueError(
                    f"pattern={pattern}: {matrix.name} of layer {layer} has {inputs} inputs, which are no groups of "
                    f"{kept[1]}: choose another pattern, or leave {matrix.kind} out (where=, spare=)."
                )


def _require_zeros(layers: Mapping[int, Sequence[Matrix]], sparsity: float) -> None:
    """Raise ValueError for a fraction that is less than one weight of every matrix."""
    most = max(matrix.weight_BOI[0].numel() for matrices in layers.values() for matrix in matrices)
    if _count(sparsity, most) == 0:
        raise ValueError(
            f"sparsity={sparsity} would set no weight to zero in matrices of at most {most} weights: say at least "
            f"sparsity={1 / most:.4g}."
        )


def _count(sparsity: float, weights: int) -> int:
    """How many of a matrix's weights a fraction is."""
    return int(sparsity * weights + 0.5)


def try_prune(group: MatrixGroup, *, sparsity_B: Tensor, method: Way, **_: Any) -> list[Tensor]:
    """Pruned matrices without making up for anything: by |w| alone for magnitude, else as Wanda does."""
    return _masked(group, sparsity_B, None, method != "magnitude")


@weight_method(
    group="slimming",
    paper="arXiv 2301.00774 (SparseGPT), 2306.11695 (Wanda)",
    needs=_needs,
    check=check_prune,
    trial=try_prune,
    exclusive=(("sparsity", "pattern"),),
    shown_in_names=("method", "sparsity", "pattern"),
    selection_after="pattern",
    unseen=("pooled", "magnitude", "dense", "error"),
    leaves_pattern="pattern",
    allocates="sparsity",
    forecast_note="Pruned weights are stored as zeros: the file is no smaller, nor faster where no kernel uses them.",
)
def prune(
    group: MatrixGroup, *, method: Way = "wanda", sparsity: float | None = 0.5, pattern: str | None = None
) -> NewMatrices:
    """Set weights to zero: a fraction (sparsity=0.5), or all but n of every m inputs (pattern=2:4)."""
    kept = pattern_of(pattern or "")
    sparsity_B = torch.full((len(group.names),), sparsity or 0.0) if group.sparsity_B is None else group.sparsity_B
    sparsity_B = sparsity_B.to(group.weights[0].device)
    if method == "sparsegpt":
        assert group.moment is not None
        weights, damped = sparsegpt(group.weights, group.moment, sparsity_B, kept, group.names)
        return NewMatrices(weights, {"damped": damped})
    return NewMatrices(_masked(group, sparsity_B, kept, method == "wanda"))


def _masked(group: MatrixGroup, sparsity_B: Tensor, kept: tuple[int, int] | None, by_input: bool) -> list[Tensor]:
    """Matrices without the weights of lowest score: of each row where the inputs count, else of the whole matrix."""
    found = []
    for weight_BOI in group.weights:
        score_BOI = weight_BOI.abs().float()
        if by_input and group.moment is not None:
            score_BOI *= group.moment.sqrt().unsqueeze(1)
        found.append(weight_BOI.masked_fill(_gone(score_BOI, sparsity_B, kept, by_input), 0))
    return found


def _gone(score_BOI: Tensor, sparsity_B: Tensor, kept: tuple[int, int] | None, in_rows: bool) -> Tensor:
    if kept is not None:
        return lowest_in_groups(score_BOI, *kept)
    count_B = (sparsity_B.to(score_BOI.device).double() * score_BOI[0].numel() + 0.5).long()
    if in_rows:
        return lowest_in_rows(score_BOI, count_B)
    return lowest(score_BOI.flatten(1), count_B).view_as(score_BOI)
