"""The loss's gradient, brought back through one layer at a time: what each neuron of an expert is worth to it.

One forward keeps what enters every layer; then each layer runs again, with gradients, from the last to the first.
E experts, F neurons, D model width, N windows of S positions, R routed rows, P predicted tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_compress.data.windows import Windows
from moe_compress.engine.forward import Batch, Progress, Stream, embed_windows, run_batches
from moe_compress.engine.layers import Layers
from moe_compress.engine.observer import Observer
from moe_compress.models import hf
from moe_compress.utils.files import require_disk

TOKENS_PER_CHUNK = 1024


def backward(
    layers: Layers, windows: Windows, observer: Observer, scratch: Path, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """What the observer saw of each layer as the gradient of the mean loss came back through it.

    What enters the layers is kept in a file in `scratch`, removed at the end, and not in memory. Raises ValueError if
    the disk is too small for it.
    """
    count = len(hf.decoder_layers(layers.model))
    with torch.no_grad():
        batches, stream = embed_windows(layers, windows)
        entered_LNSD = _kept_on_disk((count, *stream.hidden_NSD.shape), stream.hidden_NSD.dtype, scratch)
        handed: list[dict[int, Tensor]] = []
        for index in range(count):
            entered_LNSD[index] = stream.hidden_NSD.cpu()
            handed.append(dict(stream.handed))
            with layers.layer(index) as layer:
                run_batches(index, layer, stream, batches, (), go_on=True)
        gradient_NSD = _at_the_end(layers, stream.hidden_NSD, windows)
    seen: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for index in reversed(range(count)):
        with layers.layer(index) as layer:
            entered = Stream(entered_LNSD[index], handed[index])
            seen[index] = _back(index, layer, entered, gradient_NSD, batches, observer)
        if progress is not None:
            progress(count - index, count)
    return seen


def _back(
    index: int,
    layer: nn.Module,
    entered: Stream,
    gradient_NSD: Tensor,
    batches: Sequence[Batch],
    observer: Observer,
) -> dict[str, Tensor]:
    """Bring the gradient back through one layer, in place."""
    observer.enter(index, layer)
    for batch in batches:
        observer.begin(batch.info)
        here_BSD = gradient_NSD[batch.rows]
        with torch.enable_grad():
            hidden_BSD = entered.hidden_NSD[batch.rows].to(here_BSD.device).requires_grad_()
            output = hf.layer_output(layer, hidden_BSD, batch.calls[index], entered.handed_to(batch))
            torch.autograd.backward(output.hidden_BSD, here_BSD)
        assert hidden_BSD.grad is not None
        gradient_NSD[batch.rows] = hidden_BSD.grad
    return observer.leave()


def _at_the_end(layers: Layers, hidden_NSD: Tensor, windows: Windows) -> Tensor:
    """Gradient of the mean loss over the predicted tokens, at the final hidden states."""
    where = windows.predictions()
    target_P = windows.ids_NS[where[:, 0], where[:, 1] + 1].to(hidden_NSD.device)
    gradient_NSD = torch.zeros_like(hidden_NSD)
    for start in range(0, len(where), TOKENS_PER_CHUNK):
        n, s = where[start : start + TOKENS_PER_CHUNK].unbind(1)
        with torch.enable_grad():
            hidden_PD = hidden_NSD[n, s].requires_grad_()
            logits_PV = hf.logits(layers.model, hidden_PD).float()
            loss = cross_entropy(logits_PV, target_P[start : start + len(n)], reduction="sum") / len(where)
        (gradient_NSD[n, s],) = torch.autograd.grad(loss, hidden_PD)
    return gradient_NSD


def _kept_on_disk(shape: Sequence[int], dtype: torch.dtype, scratch: Path) -> Tensor:
    """A tensor of zeros that lies in a file without a name: it is gone with the tensor, or with the process."""
    size = math.prod(shape) * dtype.itemsize
    advice = "use fewer or shorter windows (samples=, length=), or another disk with results="
    require_disk(scratch, size, "what enters the layers", advice)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch) as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
