"""What the matrices of a layer are multiplied with: second moments of their inputs, from each expert's own tokens.

B experts (or 1), I inputs, T tokens, R rows. Sums, so that they add up over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_compress.engine.observer import BatchInfo
from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.matrices import INNER, ROUTED, ROUTER, Kind, Matrix, layer_matrices
from moe_compress.models.moe import moe_view

Statistic = Literal["input_squares", "input_grams"]
# Rows that are kept before they are multiplied: products of few rows are slow.
PENDING = 8192
# Gram matrices are symmetric: of so many blocks of rows, each from the diagonal on, 5/8 of the products are needed.
BLOCKS = 4
NARROWEST = 128


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the rows that reach one source: of squares, [B, I], or of outer products, [B, I, I].

    count_B: rows of each expert; pooled, pooled_count: the same over all experts of the layer; most_B: the largest
    magnitude in the rows of each expert, over all of them for one without rows.
    """

    count_B: Tensor
    total: Tensor
    pooled: Tensor
    pooled_count: int
    most_B: Tensor | None = None

    def mean(self, shrink: float, rare_B: Tensor, use_pooled: bool) -> Tensor:
        """Mean moments of each expert, with `shrink` tokens of the pooled mean mixed in.

        rare_B: experts that take the pooled mean alone or, unless `use_pooled`, have no preference among inputs.
        """
        pooled_mean = self.pooled / max(self.pooled_count, 1)
        shape = (-1, *[1] * self.pooled.dim())
        count = self.count_B.float().view(shape)
        mean = (self.total + shrink * pooled_mean) / (count + shrink).clamp_min(torch.finfo(torch.float32).tiny)
        if use_pooled and self.pooled_count:
            return torch.where(rare_B.view(shape), pooled_mean, mean)
        ones_I = torch.ones(self.pooled.shape[-1], device=self.pooled.device)
        return torch.where(rare_B.view(shape), ones_I if self.pooled.dim() == 1 else ones_I.diag(), mean)


class RunningSums:
    """Running sums of rows in groups (experts); `add` takes rows sorted by group."""

    def __init__(self, groups: int, inputs: int, statistic: Statistic, device: torch.device) -> None:
        shape = (inputs,) if statistic == "input_squares" else (inputs, inputs)
        self.statistic = statistic
        self.total = torch.zeros(groups, *shape, device=device)
        self.count_B = torch.zeros(groups, dtype=torch.long, device=device)
        self.most_B = torch.zeros(groups, device=device)
        self.pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.waiting, self.paired = 0, False

    def add(self, x_RI: Tensor, group_R: Tensor, other_RI: Tensor | None = None) -> None:
        """Take rows in; group_R is ascending. other_RI: what they are multiplied with, if not with themselves."""
        x_RI = x_RI.float()
        if len(x_RI):
            self.most_B.scatter_reduce_(0, group_R, x_RI.abs().amax(1), "amax")
        if self.statistic == "input_squares":
            self.count_B += torch.bincount(group_R, minlength=len(self.count_B))
            self.total.index_add_(0, group_R, x_RI.square())
            return
        self.paired = self.paired or other_RI is not None
        self.pending.append((x_RI, group_R, None if other_RI is None else other_RI.float()))
        self.waiting += len(x_RI)
        if self.waiting >= PENDING:
            self.flush()

    def flush(self) -> None:
        """Multiply the rows that wait, one product per group."""
        if not self.pending:
            return
        group_R = torch.cat([group for _, group, _ in self.pending])
        x_RI = torch.cat([x for x, _, _ in self.pending])
        others = [other for _, _, other in self.pending if other is not None]
        other_RI = torch.cat(others) if others else None
        if len(self.pending) > 1:
            group_R, order = group_R.sort(stable=True)
            x_RI, other_RI = x_RI[order], None if other_RI is None else other_RI[order]
        count_B = torch.bincount(group_R, minlength=len(self.count_B))
        counts = count_B.tolist()
        parts = x_RI.split(counts)
        partners = parts if other_RI is None else other_RI.split(counts)
        for total_II, part_RI, partner_RI in zip(self.total, parts, partners, strict=True):
            if partner_RI is part_RI:
                _add_gram(total_II, part_RI)
            else:
                total_II.addmm_(part_RI.T, partner_RI)
        self.count_B += count_B
        self.pending, self.waiting = [], 0

    def finish(self) -> None:
        """Multiply the rows that wait; Gram matrices are then whole."""
        self.flush()
        if self.statistic == "input_grams" and not self.paired:
            for gram_II in self.total:
                _mirror(gram_II)


def _blocks(inputs: int) -> Iterator[slice]:
    """Rows of a Gram matrix, a quarter of them at a time, as long as such products are worth calling."""
    step = max(NARROWEST, -(-inputs // BLOCKS))
    return (slice(start, min(start + step, inputs)) for start in range(0, inputs, step))


def _add_gram(gram_II: Tensor, x_RI: Tensor) -> None:
    """Add x'x on and above the diagonal, by blocks: what lies below is the same."""
    for rows in _blocks(len(gram_II)):
        gram_II[rows, rows.start :].addmm_(x_RI[:, rows].T, x_RI[:, rows.start :])


def _mirror(gram_II: Tensor) -> None:
    """Let what lies below the blocks on the diagonal be what lies above."""
    for rows in _blocks(len(gram_II)):
        gram_II[rows.stop :, rows] = gram_II[rows, rows.stop :].T


class InputMomentCollector:
    """Sums up what the matrices of the chosen kinds see in a layer; `found` holds it by source once the layer is done.

    experts: those whose rows are summed one by one (None: all); the pooled sums are of all experts; by_gate: rows of
    experts count as much as what an expert adds does, by the square of its gate; pooled: the statistic of the pooled
    sums, where that is another one.
    """

    def __init__(
        self,
        family: Family,
        kinds: Sequence[Kind],
        statistic: Statistic,
        experts: range | None,
        *,
        by_gate: bool = False,
        pooled: Statistic | None = None,
    ) -> None:
        self.family = family
        self.kinds = kinds
        self.statistic = statistic
        self.experts = experts
        self.by_gate = by_gate
        self.pooled_statistic = pooled or statistic
        self.found: dict[str, Moments] = {}

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to everything that feeds a chosen matrix."""
        self.view = moe_view(layer, self.family)
        self.sums: dict[str, RunningSums] = {}
        self.pooled: dict[str, RunningSums] = {}
        self.hooks: list[Any] = []
        for matrix in layer_matrices(layer, self.family, self.kinds):
            if matrix.source not in self.sums:
                self._listen(layer, matrix)
        if ROUTED in self.sums:
            assert self.view is not None
            hf.tap(self.view.block, self.view.experts, self._rows)

    def _listen(self, layer: nn.Module, matrix: Matrix) -> None:
        groups, _, inputs = matrix.weight_BOI.shape
        device = matrix.weight_BOI.device
        if matrix.kind == "experts":
            if self.experts is not None:
                groups = len(self.experts)
            if self.experts is not None or self.pooled_statistic != self.statistic:
                self.pooled[matrix.source] = RunningSums(1, inputs, self.pooled_statistic, device)
        elif matrix.source == ROUTER:
            assert self.view is not None
            self.hooks.append(self.view.router.register_forward_pre_hook(self._input(ROUTER), with_kwargs=True))
        else:
            module = layer.get_submodule(matrix.source)
            self.hooks.append(module.register_forward_pre_hook(self._input(matrix.source), with_kwargs=True))
        self.sums[matrix.source] = RunningSums(groups, inputs, self.statistic, device)

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count."""
        self.real_T = batch.real_T

    def _input(self, source: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x_RI = args[0] if args else next(iter(kwargs.values()))
            x_RI = x_RI.flatten(0, -2)
            real_R = self.real_T.repeat_interleave(len(x_RI) // len(self.real_T))
            x_RI = x_RI[real_R]
            self.sums[source].add(x_RI, torch.zeros(len(x_RI), dtype=torch.long, device=x_RI.device))

        return hook

    def _rows(self, rows: RoutedRows) -> None:
        real_R = self.real_T[rows.token_R]
        assert self.view is not None
        # Where the gate scales the input, rows have met it already.
        gate_R = rows.gate_R.float() if self.by_gate and not hf.gate_on_input(self.view.experts) else None
        for source, x_RI in ((ROUTED, rows.input_RD), (INNER, rows.inner_RF)):
            x_RI = x_RI if gate_R is None else x_RI.float() * gate_R.unsqueeze(1)
            x_RI, expert_R = x_RI[real_R], rows.expert_R[real_R]
            if source in self.pooled:
                self.pooled[source].add(x_RI, torch.zeros_like(expert_R))
            if self.experts is not None:
                mine_R = (expert_R >= self.experts.start) & (expert_R < self.experts.stop)
                x_RI, expert_R = x_RI[mine_R], expert_R[mine_R] - self.experts.start
            self.sums[source].add(x_RI, expert_R)

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """Sum what still waits; nothing of it is kept in files."""
        for hook in self.hooks:
            hook.remove()
        if ROUTED in self.sums:
            assert self.view is not None
            hf.untap(self.view.block, self.view.experts, self._rows)
        for sums in (*self.sums.values(), *self.pooled.values()):
            sums.finish()
        for source, sums in self.sums.items():
            pooled = self.pooled.get(source, sums)
            most_B = torch.where(sums.most_B > 0, sums.most_B, pooled.most_B.max())
            count = int(pooled.count_B.sum())
            self.found[source] = Moments(sums.count_B, sums.total, pooled.total.sum(0), count, most_B)
        return {}
