"""How changed layers are written, in whatever format: written, read back, and compared with what was decided."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import CodedMatrix, LayerToStore, Writer
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.rescaling import Rescale
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.weight_method import NewMatrices, QuantizedMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, Matrix, layer_matrices, stored_matrices
from moe_compress.models.modeling.packed_linear import PARAMETERS


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """A stack of matrices, what becomes of it, and its codes, where it is quantized."""

    matrix: Matrix
    result: Tensor
    quantized: QuantizedMatrices | None = None


class LayerStore:
    """Writes changed layers in one format; what did not change is stored as it was, to the last bit."""

    def __init__(
        self,
        format: Writer,
        source: Checkpoint,
        layers: StreamedLayers,
        writer: CheckpointWriter,
        kinds: Sequence[Kind],
    ) -> None:
        self.format = format
        self.layers, self.writer, self.kinds = layers, writer, kinds
        self.rescales: list[Rescale] = []
        self.source = source
        self.modules: dict[str, Tensor] = {}
        self.model, self.family = layers.model, family_of(source.config)
        self.exact = exact_layers(source, self.model)

    def rescale(self, rescales: Sequence[Rescale]) -> None:
        """What was done to the layer at hand before its matrices were changed, other parts included."""
        self.rescales = list(rescales)

    def write(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Write the layer, codes in place of the weights that have some, as the format says."""
        packed = {change.matrix.name: change.quantized for change in changes if change.quantized is not None}
        with self.changed(index, layer, changes) as (model, stored):
            if self.format.layer is not None:
                self.modules = self.format.layer(LayerToStore(model, index, stored, packed))
                self.writer.write(index, {**self.modules, **self._still_packed(index, changes)})
                return
            parts, still = self._parts(index, packed), self._still_packed(index, changes)
            state = hf.layer_state(model, index)
            tensors: dict[str, Any] = hf.checkpoint_tensors(model, state, apart=bool(parts or still))
        self.writer.write(index, {**tensors, **still, **parts})

    def _still_packed(self, index: int, changes: Sequence[MatrixChange]) -> dict[str, StoredWeight]:
        stacked = any(change.matrix.kind == "experts" for change in changes)
        return still_packed(self.source, self.model, index, {change.matrix.name for change in changes}, stacked)

    def _parts(self, index: int, packed: Mapping[str, QuantizedMatrices]) -> dict[str, Any]:
        """What stands for packed matrices, by the names that stock checkpoints give to them."""
        make = self.format.parts
        if make is None:
            return {}
        return {
            name: make(_coded(packed[matrix], b))
            for name, (matrix, b) in stored_matrices(self.model, index).items()
            if matrix in packed
        }

    @contextlib.contextmanager
    def changed(
        self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]
    ) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
        """The layer as it will be stored, in plain numbers, and the model that it belongs to."""
        if self.exact is None:
            for change in changes:
                change.matrix.weight_BOI.copy_(change.result)
            yield self.model, layer
            return
        with self.exact.layer(index) as stored:
            for rescale in self.rescales:
                rescale.apply(stored, self.family)
            for change, exact in zip(changes, layer_matrices(stored, self.family, self.kinds), strict=True):
                # A weight that is zero in the arithmetic alone may be one that has to go: zeros are always written.
                same_BOI = (change.matrix.weight_BOI == change.result) & (change.result != 0)
                new_BOI = change.result.to(exact.weight_BOI)
                exact.weight_BOI.copy_(torch.where(same_BOI.to(new_BOI.device), exact.weight_BOI, new_BOI))
            yield self.exact.model, stored

    def verify(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Read the layer back; it then holds the weights that go on, and the file what was decided."""
        if self.format.layer is not None:
            self._verify_modules(index)
            for change in changes:
                change.matrix.weight_BOI.copy_(change.result)
            return
        with self.writer.read(index) as tensors:
            hf.materialize(self.model, tensors, self.layers.device)
        for change, now in zip(changes, layer_matrices(layer, self.family, self.kinds), strict=True):
            # Every zero that was set has to be one in the file, and codes have to stand for what was decided.
            kept = bool((now.weight_BOI == 0)[change.result == 0].all())
            assert kept, f"layer {index}: {change.matrix.name} lost zeros on its way to disk"
            coded = change.quantized is not None and self.format.parts is not None
            same = not coded or torch.equal(now.weight_BOI, change.result.to(now.weight_BOI))
            assert same, f"layer {index}: {change.matrix.name} is not what was packed"

    def _verify_modules(self, index: int) -> None:
        """Codes and scales in modules of their own have to be those that were decided."""
        with self.writer.read(index) as tensors:
            for name, tensor in self.modules.items():
                packed = name.rpartition(".")[2] in PARAMETERS
                same = not packed or torch.equal(tensors[name][...].to(tensor), tensor)
                assert same, f"layer {index}: {name} is not what was packed"


def exact_layers(source: Checkpoint, model: PreTrainedModel) -> StreamedLayers | None:
    """A second reading, for what no method changes, where the arithmetic is narrower than what is stored."""
    narrower = torch.promote_types(model.dtype, source.stored_dtype) != model.dtype
    return StreamedLayers(source, torch.device("cpu"), source.stored_dtype) if narrower else None


def still_packed(
    source: Checkpoint, model: PreTrainedModel, index: int, changed: Collection[str], stacked: bool
) -> dict[str, StoredWeight]:
    """What is packed in the source and does not change, as it lies there; stacked: stacks of experts change, too."""
    entries = {key: source.tensors[key] for key in source.keys(index)}
    held = {key: entry for key, entry in entries.items() if isinstance(entry, StoredWeight)}
    if not held:
        return {}
    places = stored_matrices(model, index)
    return {
        key: entry
        for key, entry in held.items()
        if not (places[key][0] in changed if key in places else stacked and ".experts." in key)
    }


def _coded(stack: QuantizedMatrices, number: int) -> CodedMatrix:
    """One matrix of a stack, on the CPU."""
    more = [None if each is None else each[number].cpu() for each in (stack.zero, stack.divisor, stack.input_divisor)]
    return CodedMatrix(stack.codes[number].cpu(), stack.scale[number].cpu(), stack.bits[number], *more)


class MatrixDraft:
    """A stack of matrices while it is being changed, a part of its experts at a time."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.result = torch.empty_like(matrix.weight_BOI)
        self.quantized: QuantizedMatrices | None = None

    def take(self, part: slice, stay_B: Tensor, changed: NewMatrices, number: int) -> None:
        """Take in what a method made of the part; experts that are to stay do."""
        new_BOI, before_BOI = changed.weights[number], self.matrix.weight_BOI[part]
        self.result[part] = torch.where(stay_B[:, None, None], before_BOI, new_BOI.to(before_BOI))
        if changed.quantized:
            found = changed.quantized[number]
            if self.quantized is None:
                self.quantized = _room(found, len(self.result))
            for mine, new in zip(_tensors(self.quantized), _tensors(found), strict=True):
                mine[part] = new
            self.quantized.bits[part] = found.bits

    def change(self) -> MatrixChange:
        """The stack as it will be."""
        # Routers are no linear maps: they are stored as plain numbers.
        return MatrixChange(self.matrix, self.result, None if self.matrix.kind == "router" else self.quantized)


def _room(like: QuantizedMatrices, count: int) -> QuantizedMatrices:
    """Room for so many matrices like these."""
    codes, scale = (each.new_empty(count, *each.shape[1:]) for each in (like.codes, like.scale))
    more = [
        None if each is None else each.new_empty(count, *each.shape[1:])
        for each in (like.zero, like.divisor, like.input_divisor)
    ]
    return QuantizedMatrices(codes, scale, [0] * count, *more)


def _tensors(stack: QuantizedMatrices) -> list[Tensor]:
    """Codes, scales, and what else there is."""
    every = (stack.codes, stack.scale, stack.zero, stack.divisor, stack.input_divisor)
    return [each for each in every if each is not None]
