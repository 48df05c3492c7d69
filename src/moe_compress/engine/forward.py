"""The one engine: run all batches through layer i while observers watch, pass the hidden states on, release it.

The fold takes its layers from safetensors (one in memory at a time) or from a resident model; it names no method
and no family. N windows of S positions, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import Windows
from moe_compress.engine.layers import Layers
from moe_compress.engine.observer import BatchInfo, Observer
from moe_compress.models import hf
from moe_compress.utils.logging import log

TOKENS_PER_BATCH = 1024
BOUNDARY = "boundary.safetensors"
Progress = Callable[[int, int], None]


@torch.no_grad()
def forward_layers(
    layers: Layers,
    windows: Windows,
    observers: Sequence[Observer] = (),
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[list[dict[str, Tensor]]], Tensor]:
    """Run all windows through all layers.

    Returns what each observer saw, [layer][observer], and the final hidden states [N, S, D] (before the last
    norm). With `state`, finished layers and the hidden states between layers are kept there, so that a killed
    run goes on where it stopped.
    """
    batches, stream = embed_windows(layers, windows)
    seen, start = _resume(state, stream, len(observers))
    count = len(hf.decoder_layers(layers.model))
    for index in range(start, count):
        with layers.layer(index) as layer:
            seen.append(run_batches(index, layer, stream, batches, observers, go_on=True))
        if state is not None:
            _save(state, index, seen[-1], stream)
        if progress is not None:
            progress(index + 1, count)
    return seen, stream.hidden_NSD


@dataclass(slots=True)
class Batch:
    """Windows that run together, and how each layer is called for them."""

    rows: slice
    info: BatchInfo
    calls: list[hf.LayerCall] = field(default_factory=list)


@dataclass(slots=True)
class Stream:
    """What passes from layer to layer: hidden states [N, S, D], and by a batch's first row what is handed on besides.

    Of the latter, whole numbers (of tokens) are kept in as few bytes as they fit into.
    """

    hidden_NSD: Tensor
    handed: dict[int, Tensor] = field(default_factory=dict)

    def handed_to(self, batch: Batch) -> Tensor | None:
        """What the layer before hands on to the rows of a batch."""
        handed = self.handed.get(batch.rows.start)
        return handed if handed is None or handed.is_floating_point() else handed.long()

    def take(self, batch: Batch, output: hf.LayerOutput) -> None:
        """Let what left a layer be what enters the next one."""
        self.hidden_NSD[batch.rows] = output.hidden_BSD
        if output.handed is None:
            self.handed.pop(batch.rows.start, None)
        else:
            self.handed[batch.rows.start] = _narrow(output.handed, self.hidden_NSD.shape[1])

    def copy(self) -> Stream:
        """The same in tensors of its own."""
        return Stream(self.hidden_NSD.clone(), {row: each.clone() for row, each in self.handed.items()})


def _narrow(handed: Tensor, length: int) -> Tensor:
    """Numbers of tokens of a window of this length in few bytes; numbers of other kinds as they are."""
    if handed.is_floating_point():
        return handed
    return handed.to(torch.int16 if length <= torch.iinfo(torch.int16).max else torch.int32)


def run_batches(
    index: int,
    layer: nn.Module,
    stream: Stream,
    batches: Sequence[Batch],
    observers: Sequence[Observer],
    *,
    go_on: bool,
) -> list[dict[str, Tensor]]:
    """Run one layer on every batch; `go_on`: what leaves it takes the place of what entered."""
    for observer in observers:
        observer.enter(index, layer)
    for batch in batches:
        for observer in observers:
            observer.begin(batch.info)
        rows_BSD = stream.hidden_NSD[batch.rows]
        output = hf.run_layer(layer, rows_BSD, batch.calls[index], stream.handed_to(batch))
        for observer in observers:
            observer.end(output.hidden_BSD)
        if go_on:
            stream.take(batch, output)
    return [observer.leave() for observer in observers]


class LayerPass(Protocol):
    """Runs a layer over its stream."""

    def __call__(
        self, observers: Sequence[Observer], go_on: bool, first_batch: bool = False
    ) -> list[dict[str, Tensor]]:
        """What the observers saw; `go_on`: the stream goes on behind the layer; `first_batch`: no more than that."""


@torch.no_grad()
def walk_layers(
    layers: Layers,
    windows: Windows,
    visit: Callable[..., None],
    *,
    streams: int = 1,
    state: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Visit every layer with one or more streams of hidden states, which are the same until a visit parts them.

    `visit(index, layer, *runs)` may change the layer; a run, of type LayerPass, runs the layer over its stream.
    Each has to go on once.
    With `state`, the streams between two layers are kept there, so that a killed run goes on where it stopped.
    """
    batches, stream = embed_windows(layers, windows)
    all_streams = [stream, *(stream.copy() for _ in range(streams - 1))]
    start = resume_streams(state, all_streams)
    count = len(hf.decoder_layers(layers.model))
    for index in range(start, count):
        with layers.layer(index) as layer:

            def run(
                stream: Stream, observers: Sequence[Observer], go_on: bool, first_batch: bool = False
            ) -> list[dict[str, Tensor]]:
                some = batches[:1] if first_batch else batches
                return run_batches(index, layer, stream, some, observers, go_on=go_on)  # noqa: B023

            visit(index, layer, *(functools.partial(run, each) for each in all_streams))
        if state is not None:
            save_streams(state, index + 1, all_streams)
        if progress is not None:
            progress(index + 1, count)


def windows_per_batch(windows: Windows) -> int:
    """How many windows run together."""
    return max(1, TOKENS_PER_BATCH // windows.ids_NS.shape[1])


def embed_windows(layers: Layers, windows: Windows, size: int | None = None) -> tuple[list[Batch], Stream]:
    """The windows in batches (of `size`, where that is given), and what enters the first layer."""
    size = size or windows_per_batch(windows)
    batches = [Batch(rows, _batch_info(windows, rows, layers.device)) for rows in windows.batches(size)]
    return batches, Stream(_enter(layers, windows, batches))


def _enter(layers: Layers, windows: Windows, batches: Sequence[Batch]) -> Tensor:
    """Embed every batch, [N, S, D], and note how layers are called; batches called alike share one note."""
    hidden_NSD: Tensor | None = None
    first: list[hf.LayerCall] = []
    for batch in batches:
        ids_BS = windows.ids_NS[batch.rows].to(layers.device)
        mask_BS = windows.mask_of(batch.rows, layers.device)
        entered_BSD, calls = hf.enter(layers.model, ids_BS, mask_BS)
        first = first or calls
        batch.calls = first if hf.called_alike(first, calls) else calls
        if hidden_NSD is None:
            hidden_NSD = entered_BSD.new_empty((len(windows), *entered_BSD.shape[1:]))
        hidden_NSD[batch.rows] = entered_BSD
    assert hidden_NSD is not None
    return hidden_NSD


def _batch_info(windows: Windows, batch: slice, device: torch.device) -> BatchInfo:
    length = windows.ids_NS.shape[1]
    component_T = windows.component_N[batch].repeat_interleave(length)
    return BatchInfo(windows.counted_NS[batch].reshape(-1).to(device), component_T.to(device))


# --- resuming -----------------------------------------------------------------------------------------------


def _save(state: Path, index: int, seen: Sequence[dict[str, Tensor]], stream: Stream) -> None:
    """First what was seen of the layer, then what leaves it: a kill in between repeats it."""
    write_shard(state / _layer_file(index), {f"{i}.{k}": v for i, part in enumerate(seen) for k, v in part.items()})
    save_streams(state, index + 1, [stream])


def save_streams(state: Path, following: int, streams: Sequence[Stream]) -> None:
    """Keep the streams that enter layer `following`."""
    named = {f"hidden.{i}": stream.hidden_NSD for i, stream in enumerate(streams)}
    handed = {f"handed.{i}.{row}": each for i, stream in enumerate(streams) for row, each in stream.handed.items()}
    write_shard(state / BOUNDARY, {"next": torch.tensor(following), **named, **handed})


def resume_streams(state: Path | None, streams: Sequence[Stream]) -> int:
    """Read the streams back in place; returns the layer that they enter. A file that is broken counts for nothing."""
    if state is None or not (state / BOUNDARY).is_file():
        return 0
    try:
        with safe_open(state / BOUNDARY, "pt") as kept:
            found = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
            hidden = [found[f"hidden.{i}"] for i in range(len(streams))]
    except (SafetensorError, KeyError):
        return 0
    for i, stream in enumerate(streams):
        stream.hidden_NSD.copy_(hidden[i])
        rows = {key: key.removeprefix(f"handed.{i}.") for key in found if key.startswith(f"handed.{i}.")}
        stream.handed = {int(row): found[key].to(stream.hidden_NSD.device) for key, row in rows.items()}
    following = int(found["next"])
    log.info("going on behind layer %d, as an earlier run was stopped.", following - 1)
    return following


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _resume(state: Path | None, stream: Stream, observers: int) -> tuple[list[list[dict[str, Tensor]]], int]:
    """What was seen of finished layers, and the first layer to run; the stream is read back in place."""
    resumed = stream.copy()
    start = resume_streams(state, [resumed])
    seen = []
    try:
        for index in range(start):
            assert state is not None
            parts: dict[int, dict[str, Tensor]] = {}
            for key, tensor in load_file(state / _layer_file(index)).items():
                observer, _, name = key.partition(".")
                parts.setdefault(int(observer), {})[name] = tensor
            seen.append([parts.get(i, {}) for i in range(observers)])
    except (SafetensorError, FileNotFoundError):
        return [], 0
    stream.hidden_NSD, stream.handed = resumed.hidden_NSD, resumed.handed
    return seen, start
