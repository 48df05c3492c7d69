"""SparseGPT (arXiv 2301.00774) for many matrices at once: prune column by column, the columns behind make up for it.

B experts, O outputs, I inputs, R rows of all matrices of an expert that share their inputs (gate and up).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.methods.column_solver import compensate, inputs_first, inverse_factor, revived
from moe_compress.methods.pruning.masks import lowest, lowest_in_groups


def sparsegpt(
    weights: Sequence[Tensor],
    gram_BII: Tensor,
    sparsity_B: Tensor,
    pattern: tuple[int, int] | None,
    names: Sequence[str],
) -> tuple[list[Tensor], list[int]]:
    """Pruned matrices [B, O, I] in fp32, and the experts for which the damping was raised.

    gram_BII: second moments of the inputs; sparsity_B: of the weights of each matrix that go, spread evenly over blocks
    of inputs, unless `pattern` (n of m) says which; names: of the experts, for errors. Weights of inputs that are
    always zero cost nothing and go first; those that are left keep their value. Raises ValueError for a Gram matrix
    that no damping makes definite.
    """
    gram_BII, dead_BI = revived(gram_BII.float())
    factor_BII, raised = inverse_factor(gram_BII, names)
    # What an input that is always zero is multiplied with costs nothing.
    scale_BI = factor_BII.diagonal(dim1=1, dim2=2).masked_fill(dead_BI, torch.inf)
    sizes = [weight.shape[1] for weight in weights]
    weight_BIR = inputs_first(weights)
    compensate(weight_BIR, factor_BII, _Zeros(scale_BI, sizes, sparsity_B, pattern), pattern[1] if pattern else 1)
    return list(weight_BIR.transpose(1, 2).split(sizes, 1)), raised


class _Zeros:
    """Which weights become zero: block by block or, for a pattern, group by group."""

    def __init__(
        self, scale_BI: Tensor, sizes: Sequence[int], sparsity_B: Tensor, pattern: tuple[int, int] | None
    ) -> None:
        self.scale_BI, self.sizes, self.sparsity_B, self.pattern = scale_BI, sizes, sparsity_B, pattern
        self.start = 0

    def block(self, weight_BIR: Tensor, start: int, stop: int) -> None:
        """Choose what goes from a block, in every matrix as many as bring its count up to its share by the end."""
        if self.pattern:
            return
        self.start, parts = start, []
        root_BIR = (weight_BIR[:, start:stop] / self.scale_BI[:, start:stop, None]).abs()
        for part_BIO in root_BIR.split(self.sizes, 2):
            until_B, before_B = ((self.sparsity_B.double() * part_BIO.shape[2] * n + 0.5).long() for n in (stop, start))
            parts.append(lowest(part_BIO.flatten(1), until_B - before_B).view_as(part_BIO))
        self.gone_BIR = torch.cat(parts, 2)

    def column(self, weight_BIR: Tensor, i: int) -> Tensor:
        """The column with zeros in it."""
        if self.pattern and i % self.pattern[1] == 0:
            group = slice(i, i + self.pattern[1])
            root_BGR = (weight_BIR[:, group] / self.scale_BI[:, group, None]).abs()
            self.start, self.gone_BIR = i, lowest_in_groups(root_BGR.transpose(1, 2), *self.pattern).transpose(1, 2)
        return weight_BIR[:, i].masked_fill(self.gone_BIR[:, i - self.start], 0)
