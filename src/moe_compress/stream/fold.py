"""The one engine: run all batches through layer i while observers watch, pass the hidden states on, release it.

The fold takes its layers from safetensors (one in memory at a time) or from a resident model; it names no method
and no family. N windows of S positions, D model width.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.shards import write_shard
from moe_compress.model import hf
from moe_compress.stream.data import Windows
from moe_compress.stream.observers import BatchInfo, Observer

TOKENS_PER_BATCH = 2048
BOUNDARY = "boundary.safetensors"
Progress = Callable[[int, int], None]


class Layers(Protocol):
    """Where a fold takes its layers from; `model` runs embeddings and head."""

    model: PreTrainedModel
    device: torch.device

    def layer(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """The layer with real weights, inside the block."""


class StreamedLayers:
    """A checkpoint on disk: embeddings, norm and head stay in memory, decoder layers come and go."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attn: str | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model = hf.skeleton(checkpoint.config, dtype, attn)
        hf.use_experts_function(self.model)
        self._load(None)
        self.model.tie_weights()
        hf.buffers_to(self.model, device)

    def _load(self, index: int | None) -> None:
        with self.checkpoint.read(self.checkpoint.keys(index)) as tensors:
            hf.materialize(self.model, tensors, self.device)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Read one layer; put it back on the meta device afterwards."""
        layer = hf.decoder_layers(self.model)[index]
        self._load(index)
        require_real(layer, index)
        try:
            yield layer
        finally:
            layer.to("meta")
            return_memory()


class ResidentLayers:
    """A model that is wholly in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        hf.use_experts_function(model)

    def layer(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """The layer as it is."""
        return contextlib.nullcontext(hf.decoder_layers(self.model)[index])


def require_real(layer: nn.Module, index: int) -> None:
    """Raise ValueError if a tensor of the layer was not in the checkpoint or is not finite."""
    for name, tensor in layer.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"the checkpoint holds no tensor for {name} of layer {index}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())) and not _finite(tensor):
            raise ValueError(f"the weights of layer {index} hold NaN or infinity in {name}.")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def fold(
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
    size = max(1, TOKENS_PER_BATCH // windows.ids_NS.shape[1])
    slices = list(windows.batches(size))
    hidden, calls = _enter(layers, windows, slices)
    infos = [_batch_info(windows, batch, layers.device) for batch in slices]
    seen, start = _resume(state, hidden, slices)
    count = len(hf.decoder_layers(layers.model))
    for index in range(start, count):
        with layers.layer(index) as layer:
            seen.append(_run_layer(index, layer, hidden, [call[index] for call in calls], infos, observers))
        if state is not None:
            _save(state, index, seen[-1], hidden)
        if progress is not None:
            progress(index + 1, count)
    return seen, torch.cat(hidden)


def _run_layer(
    index: int,
    layer: nn.Module,
    hidden: list[Tensor],
    calls: Sequence[hf.LayerCall],
    infos: Sequence[BatchInfo],
    observers: Sequence[Observer],
) -> list[dict[str, Tensor]]:
    for observer in observers:
        observer.enter(index, layer)
    for number, call in enumerate(calls):
        for observer in observers:
            observer.begin(infos[number])
        hidden[number] = hf.run_layer(layer, hidden[number], call)
        for observer in observers:
            observer.end(hidden[number])
    return [observer.leave() for observer in observers]


def _enter(layers: Layers, windows: Windows, slices: Sequence[slice]) -> tuple[list[Tensor], list[list[hf.LayerCall]]]:
    """Embed every batch; batches that are called alike share one record of their calls."""
    hidden: list[Tensor] = []
    calls: list[list[hf.LayerCall]] = []
    alike: dict[tuple[int, ...], list[hf.LayerCall]] = {}
    for batch in slices:
        ids = windows.ids_NS[batch].to(layers.device)
        mask = windows.mask_of(batch, layers.device)
        entered, made = hf.enter(layers.model, ids, mask)
        hidden.append(entered)
        calls.append(alike.setdefault(tuple(ids.shape), made) if mask is None else made)
    return hidden, calls


def _batch_info(windows: Windows, batch: slice, device: torch.device) -> BatchInfo:
    length = windows.ids_NS.shape[1]
    component_T = windows.component_N[batch].repeat_interleave(length)
    return BatchInfo(windows.mask_NS[batch].reshape(-1).to(device), component_T.to(device))


# --- resuming -----------------------------------------------------------------------------------------------


def _save(state: Path, index: int, seen: Sequence[dict[str, Tensor]], hidden: Sequence[Tensor]) -> None:
    """First what was seen of the layer, then the hidden states that leave it: a kill in between repeats it."""
    state.mkdir(parents=True, exist_ok=True)
    write_shard(state / _layer_file(index), {f"{i}.{k}": v for i, part in enumerate(seen) for k, v in part.items()})
    write_shard(state / BOUNDARY, {"next": torch.tensor(index + 1), "hidden": torch.cat(list(hidden))})


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _resume(
    state: Path | None, hidden: list[Tensor], slices: Sequence[slice]
) -> tuple[list[list[dict[str, Tensor]]], int]:
    if state is None or not (state / BOUNDARY).is_file():
        return [], 0
    with safe_open(state / BOUNDARY, "pt") as kept:
        start = int(kept.get_tensor("next"))
        for number, batch in enumerate(slices):
            hidden[number] = kept.get_slice("hidden")[batch].to(hidden[number].device).clone()
    seen = []
    for index in range(start):
        parts: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(state / _layer_file(index)).items():
            observer, _, name = key.partition(".")
            parts.setdefault(int(observer), {})[name] = tensor
        seen.append([parts.get(i, {}) for i in range(max(parts, default=0) + 1)])
    return seen, start


def return_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps."""
    name = ctypes.util.find_library("c")
    libc: Any = ctypes.CDLL(name) if name else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
