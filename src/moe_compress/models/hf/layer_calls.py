"""How the model calls its layers: each is replaced by a recorder while the skeleton runs once.

B sequences, S positions, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.models.hf.long_attention import (
    WholeMaskNeeded,
    blockwise_attention,
    lazy_masks,
    with_whole_masks,
)
from moe_compress.models.hf.skeleton import decoder_layers, other_layers, quiet

# Stands in recorded calls for what a layer takes from the one before it.
HANDED_ON = object()
# Names of such parameters begin so: the experts' router states (ZAYA), the tokens that an indexer chose (GLM-5).
FROM_BEFORE = "prev_"


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one of its layers: everything but the hidden states, and HANDED_ON where the layer before it
    gives something besides them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerOutput(NamedTuple):
    """What leaves a layer: the hidden states, and what it hands on to the next one besides."""

    hidden_BSD: Tensor
    handed: Tensor | None = None


def called_alike(these: list[LayerCall], others: list[LayerCall]) -> bool:
    """Whether two recordings hold the same arguments, so that one of them is enough to keep."""
    seen: dict[tuple[int, int], bool] = {}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            pair = id(a), id(b)
            if pair not in seen:
                seen[pair] = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            return seen[pair]
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))

    return all(same(a.args, b.args) and same(a.kwargs, b.kwargs) for a, b in zip(these, others, strict=True))


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the call and returns `output`, or what it was given.

    A layer that takes something from the one before it gives something to the next one, too.
    """

    def __init__(self, layer: nn.Module, output: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.call: LayerCall | None = None
        self.entered: Tensor | None = None
        self.output = output
        self.hands_on = any(name.startswith(FROM_BEFORE) for name in inspect.signature(layer.forward).parameters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call, self.entered = LayerCall(args, kwargs), hidden_states
        output = hidden_states if self.output is None else self.output
        return (output, HANDED_ON) if self.hands_on else output


@contextlib.contextmanager
def _stand_ins(model: PreTrainedModel, output: Tensor | None = None) -> Iterator[list[_Recorder]]:
    recorders = [_Recorder(layer, output) for layer in decoder_layers(model)]
    with other_layers(model, nn.ModuleList(recorders)):
        yield recorders


@torch.no_grad()
def enter(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    """Embed a batch: the hidden states [B, S, D] that enter layer 0, and how each layer will be called.

    `mask_BS` is None without padding, so that the fast attention paths stay open. Only embeddings and
    buffers need to be real: masks that alternate by layer come out right because the model itself makes them.
    """
    return entered(model, ids_BS, mask_BS)


def entered(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    """The same, with gradients where they are enabled."""
    with _stand_ins(model) as recorders, quiet():
        try:
            with lazy_masks(ids_BS.shape[1]):
                model(ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
        except WholeMaskNeeded:
            model(ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
    calls = [recorder.call for recorder in recorders]
    assert recorders[0].entered is not None and None not in calls
    return recorders[0].entered, [call for call in calls if call is not None]


# Logits that are made at a time.
LOGITS_PER_CHUNK = 1 << 25


def head_rows(model: PreTrainedModel) -> int:
    """Of how many tokens logits are made at a time."""
    return max(1, LOGITS_PER_CHUNK // int(model.config.get_text_config().vocab_size))


@torch.no_grad()
def head(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """Final norm and language-model head: logits [T, V] of final hidden states [T, D]."""
    return logits(model, hidden_TD)


def logits(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """The same, with gradients where they are enabled."""
    ids = torch.zeros(1, len(hidden_TD), dtype=torch.long, device=hidden_TD.device)
    with _stand_ins(model, output=hidden_TD[None]), quiet():
        return model(ids, use_cache=False).logits[0]


@torch.no_grad()
def run_layer(layer: nn.Module, hidden_BSD: Tensor, call: LayerCall, handed: Tensor | None = None) -> LayerOutput:
    """One decoder layer, called as the model would call it; `handed`: what the layer before it hands on."""
    return layer_output(layer, hidden_BSD, call, handed)


def layer_output(layer: nn.Module, hidden_BSD: Tensor, call: LayerCall, handed: Tensor | None = None) -> LayerOutput:
    """The same, with gradients where they are enabled."""
    args = [handed if each is HANDED_ON else each for each in call.args]
    kwargs = {name: handed if each is HANDED_ON else each for name, each in call.kwargs.items()}
    with blockwise_attention(hidden_BSD.shape[1]):
        try:
            out = layer(hidden_BSD, *args, **kwargs)
        except WholeMaskNeeded:
            out = layer(hidden_BSD, *with_whole_masks(tuple(args)), **with_whole_masks(kwargs))
    return LayerOutput(*out[:2]) if isinstance(out, tuple) else LayerOutput(out)
