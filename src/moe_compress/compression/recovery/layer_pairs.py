"""Teacher and student side by side, one layer of each in memory: what the teacher makes of the text, layer by layer.

N windows of S positions, D model width, T tokens that count, R rows of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.compression.recovery.lineage import Lineage
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import (
    Batch,
    Stream,
    embed_windows,
    resume_streams,
    run_batches,
    save_streams,
)
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import ExpertObserver
from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, router_logits


class RoutingObserver(ExpertObserver):
    """What a layer's router is given and gives, and whom it sends how many tokens, of all tokens that count.

    router_TD: the router's inputs, where they are asked for; logits_TR; load_E: tokens of each expert.
    """

    def __init__(self, family: Family, inputs: bool = False) -> None:
        super().__init__(family)
        self.inputs = inputs

    def start(self, view: MoEView) -> None:
        """Listen to the router."""
        self.rows_of_router = view.router_rows
        self.logits: list[Tensor] = []
        self.given: list[Tensor] = []
        self.load_E = torch.zeros(view.num_experts, dtype=torch.long)
        self.hook = view.router.register_forward_hook(self._router)

    def _router(self, _module: nn.Module, args: Any, output: Any) -> None:
        self.logits.append(router_logits(output, self.rows_of_router, self.family)[self.real_T].float())
        if self.inputs:
            self.given.append(args[0].detach().reshape(-1, args[0].shape[-1])[self.real_T].float())

    def rows(self, rows: RoutedRows) -> None:
        """Count tokens by expert."""
        counted_R = rows.expert_R[self.real_T[rows.token_R]]
        self.load_E += torch.bincount(counted_R, minlength=len(self.load_E)).cpu()

    def finish(self, view: MoEView) -> dict[str, Tensor]:
        """All tokens behind one another."""
        self.hook.remove()
        found = {"logits": torch.cat(self.logits), "load": self.load_E}
        return found | ({"inputs": torch.cat(self.given)} if self.inputs else {})


@dataclass(frozen=True, slots=True)
class LayerPair:
    """One layer of the student, in memory, and what the teacher's layers in its place make of the same text.

    stream: the student's hidden states as they enter; entered, target: the teacher's as they enter, and as they should
    leave; routing: what `RoutingObserver` saw of the teacher's own layer, nothing of one without experts.
    """

    index: int
    layer: nn.Module
    batches: Sequence[Batch]
    stream: Stream
    entered: Stream
    target: Stream
    routing: dict[str, Tensor]
    family: Family

    def observe(self, observer: RoutingObserver) -> dict[str, Tensor]:
        """What an observer sees of the student's layer as it is now; the stream stays where it is."""
        return run_batches(self.index, self.layer, self.stream, self.batches, [observer], go_on=False)[0]


def walk_pairs(
    teacher: StreamedLayers,
    student: StreamedLayers,
    kin: Lineage,
    windows: Windows,
    visit: Callable[[LayerPair], None],
    *,
    state: Path,
    size: int | None = None,
) -> None:
    """Visit every layer of the student, which a visit may change in place, and go on behind it as it then is.

    Both streams are kept in `state` between two layers, so that a killed run goes on where it stopped; size: windows of
    a batch.
    """
    with torch.no_grad():
        their_batches, theirs = embed_windows(teacher, windows)
        batches, ours = embed_windows(student, windows, size)
        start = resume_streams(state, [theirs, ours])
    family, count = family_of(student.model.config), len(hf.decoder_layers(student.model))
    for layer in range(start, count):
        with torch.no_grad():
            entered, routing = theirs.copy(), dict[str, Tensor]()
            for index in kin.span(layer):
                observers = [RoutingObserver(family_of(teacher.model.config))] if index == kin.sources[layer] else []
                with teacher.layer(index) as module:
                    seen = run_batches(index, module, theirs, their_batches, observers, go_on=True)
                routing = seen[0] if seen else routing
        with student.layer(layer) as module:
            visit(LayerPair(layer, module, batches, ours, entered, theirs, routing, family))
            with torch.no_grad():
                run_batches(layer, module, ours, batches, (), go_on=True)
        save_streams(state, layer + 1, [theirs, ours])
