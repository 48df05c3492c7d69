"""One call of a layer, kept and made again in fp32: whether it still adds to the stream what it added before.

B windows of S positions, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.engine.observer import BatchInfo
from moe_compress.models import hf

# How far what a layer adds to a channel of its stream may be from what it was, relative to the most that it adds there:
# rounding in fp32. And of how many entries: others are of tokens that changed between equally good experts.
CLOSE, MOST = 1e-4, 0.99


class RecordedCall:
    """An observer that keeps how the last batch called a layer; `added` calls it so once more."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the call."""
        self.hook = layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = _wide(args), _wide(kwargs)

    def begin(self, batch: BatchInfo) -> None:
        """One batch is as good as another."""

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """Stop listening."""
        self.hook.remove()
        return {}

    @torch.no_grad()
    def added(self, layer: nn.Module) -> Tensor:
        """What the layer as it is now adds to the stream [B, S, D]; its weights are in fp32."""
        hidden_BSD, *others = self.args
        return hf.run_layer(layer, hidden_BSD, hf.LayerCall(tuple(others), self.kwargs)).hidden_BSD - hidden_BSD


def _wide(value: Any) -> Any:
    """The same with numbers in fp32 where they were narrower."""
    if isinstance(value, Tensor):
        return value.float() if _is_narrow(value) else value
    if isinstance(value, dict):
        return {key: _wide(each) for key, each in value.items()}
    return type(value)(map(_wide, value)) if type(value) in (list, tuple) else value


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize


@contextlib.contextmanager
def in_full_precision(layer: nn.Module) -> Iterator[None]:
    """A layer's weights in fp32 inside the block; afterwards they are where they were, rounded again."""
    kept = [(tensor, tensor.data) for tensor in (*layer.parameters(), *layer.buffers()) if _is_narrow(tensor)]
    for tensor, data in kept:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in kept:
            data.copy_(tensor.data)
            tensor.data = data


def is_close(found_BSD: Tensor, expected_BSD: Tensor) -> bool:
    """Whether what a layer adds is the same up to rounding, channel by channel: some may be a thousand times larger."""
    most_D = expected_BSD.abs().flatten(0, 1).amax(0)
    return float(((found_BSD - expected_BSD).abs() <= CLOSE * most_D).double().mean()) >= MOST


@torch.no_grad()
def is_centred(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight: with a weight of zero, it then still gives something."""
    weight = norm.weight.data
    norm.weight.data = torch.zeros_like(weight)
    try:
        given = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
        bias = getattr(norm, "bias", None)
        return bool((norm(given) - (0.0 if bias is None else bias)).abs().max() > 0)
    finally:
        norm.weight.data = weight
