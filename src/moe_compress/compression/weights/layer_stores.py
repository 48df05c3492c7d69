"""How changed layers are written: as plain numbers, packed under stock names, or packed as modules of their own.

Each store writes a layer, reads it back, and leaves no doubt that the file holds what was decided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.compressed_tensors import packed_parts
from moe_compress.checkpoints.formats.gptq import gptq_parts
from moe_compress.checkpoints.load import packed_matrix
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.rescaling import Rescale
from moe_compress.edits.apply import shallow
from moe_compress.edits.edits import PackMatrices
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.weight_method import NewMatrices, QuantizedMatrices
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, Matrix, layer_matrices, stored_matrices
from moe_compress.models.modeling import edit_layer
from moe_compress.models.modeling.bit_packing import pack
from moe_compress.models.sublayers import block_names


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """A stack of matrices, what becomes of it, and its codes, where it is quantized."""

    matrix: Matrix
    result: Tensor
    quantized: QuantizedMatrices | None = None


class DenseStore:
    """Plain numbers in the dtype that they were stored in."""

    def __init__(
        self, source: Checkpoint, layers: StreamedLayers, writer: CheckpointWriter, kinds: Sequence[Kind]
    ) -> None:
        self.layers, self.writer, self.kinds = layers, writer, kinds
        self.rescales: list[Rescale] = []
        self.model, self.family = layers.model, family_of(source.config)
        # Where the arithmetic is narrower than what is stored, what no method changes comes from a second reading.
        narrower = torch.promote_types(self.model.dtype, source.stored_dtype) != self.model.dtype
        self.exact = StreamedLayers(source, torch.device("cpu"), source.stored_dtype) if narrower else None

    def rescale(self, rescales: Sequence[Rescale]) -> None:
        """What was done to the layer at hand before its matrices were changed, other parts included."""
        self.rescales = list(rescales)

    def write(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Write the layer; what did not change is stored as it was, to the last bit."""
        with self.changed(index, layer, changes) as (model, _layer):
            self.writer.write(index, hf.checkpoint_tensors(model, hf.layer_state(model, index)))

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
        """Read the layer back as it was written: every zero that was set has to be one in the file."""
        with self.writer.read(index) as tensors:
            hf.materialize(self.model, tensors, self.layers.device)
        for change, now in zip(changes, layer_matrices(layer, self.family, self.kinds), strict=True):
            kept = bool((now.weight_BOI == 0)[change.result == 0].all())
            assert kept, f"layer {index}: {change.matrix.name} lost zeros on its way to disk"


class CompressedTensorsStore(DenseStore):
    """compressed-tensors' `pack-quantized`, under the names that stock checkpoints give to the matrices."""

    layout = staticmethod(packed_parts)

    def write(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Write the layer, codes in place of weights."""
        with self.changed(index, layer, changes) as (model, _layer):
            tensors: dict[str, Any] = hf.checkpoint_tensors(model, hf.layer_state(model, index))
        for name, codes_OI, scale_OG, bits in self._packed(index, changes):
            tensors[name] = self.layout(codes_OI.cpu(), scale_OG.cpu(), bits)
        self.writer.write(index, tensors)

    def _packed(self, index: int, changes: Sequence[MatrixChange]) -> list[tuple[str, Tensor, Tensor, int]]:
        found = {change.matrix.name: change.quantized for change in changes if change.quantized is not None}
        return [
            (name, quantized.codes[b], quantized.scale[b], quantized.bits[b])
            for name, (matrix, b) in stored_matrices(self.model, index).items()
            if (quantized := found.get(matrix)) is not None
        ]

    def verify(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Read the layer back: the weights that its codes stand for have to be those that go on."""
        super().verify(index, layer, changes)
        for change, now in zip(changes, layer_matrices(layer, self.family, self.kinds), strict=True):
            same = torch.equal(now.weight_BOI, change.result.to(now.weight_BOI))
            assert same or change.quantized is None, f"layer {index}: {change.matrix.name} is not what was packed"


class GptqStore(CompressedTensorsStore):
    """GPTQ's layout under the same names."""

    layout = staticmethod(gptq_parts)


class EditedPackedStore(DenseStore):
    """Packed matrices as modules of their own: any width for any matrix, in an edited checkpoint."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.names = block_names(self.model)
        self.written: dict[str, Tensor] = {}

    def write(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Write the layer as the edit makes it, codes and scales filled in."""
        edit = pack_edit(index, changes)
        with self.changed(index, layer, changes) as (model, stored):
            packed = shallow(stored)
            edit_layer.pack_matrices(packed, self.names, bits=edit.bits, spans=edit.spans)
            for change in changes:
                if change.quantized is not None:
                    _fill(packed, self.names, change.matrix.name, change.quantized)
            prefix = f"{hf.layers_prefix(model)}{index}."
            state = {prefix + name: tensor for name, tensor in packed.state_dict().items()}
            self.written = hf.checkpoint_tensors(model, state)
        self.writer.write(index, self.written)

    def verify(self, index: int, layer: nn.Module, changes: Sequence[MatrixChange]) -> None:
        """Read the layer back: codes and scales have to be those that were decided."""
        with self.writer.read(index) as tensors:
            for name, tensor in self.written.items():
                same = torch.equal(tensors[name][...].to(tensor), tensor) or not name.endswith((".words", ".scales"))
                assert same, f"layer {index}: {name} is not what was packed"
        for change in changes:
            change.matrix.weight_BOI.copy_(change.result)


def _fill(layer: nn.Module, names: Mapping[str, Any], name: str, quantized: QuantizedMatrices) -> None:
    for b, bits in enumerate(quantized.bits):
        module = packed_matrix(layer, names, name, b)
        module.words.copy_(pack(quantized.codes[b], bits))
        module.scales = nn.Parameter(quantized.scale[b].contiguous(), requires_grad=False)


def pack_edit(index: int, changes: Sequence[MatrixChange]) -> PackMatrices:
    """The edit that makes room for the codes of a layer."""
    packed = {change.matrix.name: change.quantized for change in changes if change.quantized is not None}
    spans = {name: found.codes.shape[2] // found.scale.shape[2] for name, found in packed.items()}
    return PackMatrices(index, {name: tuple(found.bits) for name, found in packed.items()}, spans)


class MatrixDraft:
    """A stack of matrices while it is being changed, a part of its experts at a time."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.result = torch.empty_like(matrix.weight_BOI)
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.bits = [0] * len(self.result)

    def take(self, part: slice, stay_B: Tensor, changed: NewMatrices, number: int) -> None:
        """Take in what a method made of the part; experts that are to stay do."""
        new_BOI, before_BOI = changed.weights[number], self.matrix.weight_BOI[part]
        self.result[part] = torch.where(stay_B[:, None, None], before_BOI, new_BOI.to(before_BOI))
        if changed.quantized:
            found = changed.quantized[number]
            if self.codes is None or self.scale is None:
                self.codes = torch.empty_like(self.result, dtype=torch.int8)
                self.scale = found.scale.new_empty(*self.result.shape[:2], found.scale.shape[2])
            self.codes[part], self.scale[part] = found.codes, found.scale
            self.bits[part] = found.bits

    def change(self) -> MatrixChange:
        """The stack as it will be."""
        if self.codes is None or self.scale is None or self.matrix.kind == "router":
            return MatrixChange(
                self.matrix, self.result
            )  # routers are no linear maps: they are stored as plain numbers
        return MatrixChange(self.matrix, self.result, QuantizedMatrices(self.codes, self.scale, self.bits))
