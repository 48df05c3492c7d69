"""The layers of a model, one at a time from safetensors or all of them resident; same code, same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.models import hf
from moe_compress.models.matrices import require_masks
from moe_compress.utils.devices import return_memory


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
        self.model = checkpoint.skeleton(dtype, attn)
        hf.use_experts_function(self.model)
        self._load(None)
        hf.tie(self.model)
        inside = hf.layers_prefix(self.model)
        state, read = self.model.state_dict(), hf.text_prefixes(self.model)
        outer = {name: t for name, t in state.items() if name.startswith(read) and not name.startswith(inside)}
        for name, tensor in outer.items():
            if tensor.is_meta:
                raise ValueError(f"{checkpoint.name} holds no tensor for {name}.")
        _require_finite(outer, "outside the layers")
        hf.buffers_to(self.model, device)

    def _load(self, index: int | None) -> None:
        """Read one layer, or (None) embeddings, final norm and head."""
        with self.checkpoint.read(self.checkpoint.keys(index)) as tensors:
            hf.materialize(self.model, tensors, self.device)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Read one layer; put it back on the meta device afterwards."""
        layer = hf.decoder_layers(self.model)[index]
        self._load(index)
        require_real(layer, index)
        return_memory()
        try:
            yield layer
        finally:
            _release(layer)
            return_memory()


def _release(layer: nn.Module) -> None:
    """Put back on the meta device all that a checkpoint holds; what a layer makes itself is made only once."""
    own = [(m, name, m._buffers.get(name)) for m in layer.modules() for name in m._non_persistent_buffers_set]
    layer.to("meta")
    for module, name, buffer in own:
        module._buffers[name] = buffer


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
    _require_finite(layer.state_dict(), f"of layer {index}")
    require_masks(layer, f"layer {index}")


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        # The sum is one cheap pass; only where it is not finite is it worth asking whether an entry is to blame.
        doubtful = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum()))
        if doubtful and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the weights {where} hold NaN or infinity in {name}.")
