"""What observers of a layer's experts share: whom they listen to, which tokens count, how large the stream is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_compress.models import hf
from moe_compress.models.families import Family
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, learned_view


class ExpertObserver:
    """An observer of routed experts; `start`, `rows` and `finish` say what it keeps of a layer that has some."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def start(self, view: MoEView) -> None:
        """Begin a layer."""

    def rows(self, rows: RoutedRows) -> None:
        """Take in what went through the experts; `real_T` says which tokens count."""
        raise NotImplementedError

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """The layer is done."""
        raise NotImplementedError

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the layer's experts."""
        self.view = learned_view(layer, self.family)
        self.square = 0.0
        self.tokens = 0
        if self.view is not None:
            self.start(self.view)
            hf.tap(self.view.block, self.view.experts, self.rows)

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count."""
        self.real_T = batch.real_T

    def end(self, hidden_BSD: Tensor) -> None:
        """Add up the stream's energy."""
        real_TD = hidden_BSD.flatten(0, 1).flatten(1)[self.real_T]
        self.square += float(real_TD.double().square().sum())
        self.tokens += len(real_TD)

    @property
    def energy(self) -> float:
        """Mean square of the hidden states behind the layer."""
        return self.square / max(self.tokens, 1)

    def leave(self) -> dict[str, Tensor]:
        """What was kept of the layer."""
        if self.view is None:
            return {}
        hf.untap(self.view.block, self.view.experts, self.rows)
        return self.finish(self.view)


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What an observer must know of a batch: which tokens count, and the component of each. Flat, [T].

    Padding does not count, nor does, where the text says so, what is not the assistant's.
    """

    real_T: Tensor
    component_T: Tensor


def evenly_T(first: int, tokens: int, sample: int, total: int, device: torch.device) -> Tensor:
    """Which of the tokens numbered `first`, first + 1, ... belong to an even sample of `total` tokens, bool [T].

    The same whatever the batches: token n does where (n + 1) * sample // total is more than n * sample // total.
    """
    number_T = first + torch.arange(tokens, device=device)
    return (number_T + 1) * sample // total > number_T * sample // total


class Observer(Protocol):
    """Watches one layer at a time; `leave` returns what it saw of it."""

    def enter(self, index: int, layer: nn.Module) -> None:
        """A layer is about to run all batches."""

    def begin(self, batch: BatchInfo) -> None:
        """A batch is about to enter the layer."""

    def end(self, hidden_BSD: Tensor) -> None:
        """The batch has left the layer as these hidden states."""

    def leave(self) -> dict[str, Tensor]:
        """The layer is done."""
