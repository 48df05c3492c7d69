"""A layer whose experts become factors: in memory, and as it is written, read back and compared.

E experts, O outputs, I inputs, N bases, K their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.layer_stores import exact_layers, still_packed
from moe_compress.edits.apply import shallow
from moe_compress.edits.edits import FactorExperts
from moe_compress.edits.factors import Form, Part
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.factorisation.structures import Factors
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.modeling import edit_layer
from moe_compress.models.modeling.factored_experts import BASES, BASIS, CORE, FactoredMatrix
from moe_compress.models.modeling.unfused_experts import CHILDREN, ExpertMatrix
from moe_compress.models.moe import MoEView, moe_view, permute_neurons
from moe_compress.models.sublayers import block_names

LINEAR = "linear"


def form_of(part: Part, values: Factors) -> Form:
    """The form of the factors of a projection."""
    if values.bases is not None:
        activation: Any = None if values.activation == LINEAR else values.activation
        return Form(bases=(values.bases.shape[0], values.bases.shape[1]), activation=activation)
    if values.basis is not None:
        out = not values.left
        side: Any = None if out == (part == "down") else "out" if out else "in"
        return Form(basis=values.basis.shape[1 if out else 0], side=side)
    ranks = tuple(each.shape[1] for each in values.left)
    each = max((int((part_OI != 0).sum(1).max()) for part_OI in values.residue), default=0)
    rank = ranks[0] if len(set(ranks)) == 1 else ranks
    return Form(rank=rank, core=values.core is not None, residue=each)


def factor_layer(
    layer: nn.Module, names: Mapping[str, Any], forms: Mapping[Part, Form], linears: Mapping[str, int] | None = None
) -> None:
    """Make room for factors in a layer in memory; `names`: of its parts (`block_names`)."""
    by_part: dict[str, Mapping[str, Any]] = {part: form.to_json() for part, form in forms.items()}
    edit_layer.factor_experts(layer, names, forms=by_part, linears=linears)


def fill(fused: Any, part: Part, values: Factors) -> None:
    """Put factors into the room that was made for those of one projection, in the dtype of that room."""
    matrices: list[FactoredMatrix] = [expert[CHILDREN[part]] for expert in fused.separate]
    bases_XI = None if values.bases is None else values.bases.flatten(0, 1)
    for kind, found in ((CORE, values.core), (BASIS, values.basis), (BASES, bases_XI)):
        if found is not None:
            _put(matrices[0].shared[kind], found)
    for number, matrix in enumerate(matrices):
        for child, every in ((matrix.left, values.left), (matrix.right, values.right)):
            if child is not None:
                _put(child, every[number])
        if matrix.mix is not None and values.mix is not None:
            _put(matrix.mix, values.mix[number])
        if matrix.residue is not None:
            matrix.residue.fill(values.residue[number].to(matrix.residue.values.device))


def _put(module: Any, value: Tensor) -> None:
    """A copy of its own: what a method leaves may be a view of much more."""
    like = module.weight
    if value.shape != like.shape:
        raise ValueError(f"a factor of {tuple(value.shape)} does not fit the room for {tuple(like.shape)}.")
    module.weight = nn.Parameter(value.detach().to(like, copy=True).contiguous(), requires_grad=False)


class FactoredStore:
    """Writes layers in factors, one at a time; what does not change is stored as it was, to the last bit."""

    def __init__(self, source: Checkpoint, layers: StreamedLayers, writer: CheckpointWriter) -> None:
        self.layers, self.writer = layers, writer
        self.exact = exact_layers(source, layers.model)

    @torch.no_grad()
    def write(
        self,
        index: int,
        layer: nn.Module,
        factors: Mapping[Part, Factors],
        order_EF: Tensor | None = None,
        linears: Mapping[str, Factors] | None = None,
    ) -> FactorExperts:
        """Write the layer at hand, whose experts are then those that the stored factors stand for; returns its edit.

        order_EF: in which order the layer has the neurons of each expert, if not in that of its source; linears: left
        and right of linear maps beside the experts, by name within the layer.
        """
        model, linears = self.layers.model, linears or {}
        if self.exact is None:
            return write_factored(self.writer, model, index, layer, factors, linears)
        with self.exact.layer(index) as stored:
            if order_EF is not None:
                permute_neurons(_view(stored, model), order_EF)
            edit = write_factored(self.writer, self.exact.model, index, stored, factors, linears)
            for name in linears:
                _weight(layer, name).copy_(_weight(stored, name))
            mine = _view(layer, model).stacks()
            for part, stack_EOI in _view(stored, model).stacks().items():
                if part in factors:
                    mine[part].copy_(stack_EOI)
        return edit


@torch.no_grad()
def write_factored(
    writer: CheckpointWriter,
    model: PreTrainedModel,
    index: int,
    layer: nn.Module,
    factors: Mapping[Part, Factors],
    linears: Mapping[str, Factors] | None = None,
) -> FactorExperts:
    """Write one layer with factors in the place of its experts' matrices, and read it back; returns its edit.

    layer: of the model, with the numbers that are stored of all that stays; afterwards its experts are those that the
    stored factors stand for, and everything else is as it was: the text goes on as the checkpoint would pass it on.
    """
    linears = linears or {}
    ranks = {name: values.left[0].shape[1] for name, values in linears.items()}
    edit = FactorExperts(index, {part: form_of(part, values) for part, values in factors.items()}, ranks)
    edit.check(model)
    names, factored = block_names(model), shallow(layer)
    factor_layer(factored, names, edit.forms, ranks)
    fused: Any = factored.get_submodule(names["experts"])
    for part, values in factors.items():
        fill(fused, part, values)
    for name, values in linears.items():
        pair: Any = factored.get_submodule(name)
        _put(pair.left, values.left[0])
        _put(pair.right, values.right[0])
    prefix = f"{hf.layers_prefix(model)}{index}."
    places = [*([names["experts"]] if factors else []), *linears]
    own = {
        f"{prefix}{place}.{name}": tensor
        for place in places
        for name, tensor in factored.get_submodule(place).state_dict(keep_vars=True).items()
    }
    state = {prefix + name: tensor for name, tensor in factored.state_dict().items()}
    changed = {*(_matrices(layer, model) if factors else ()), *linears}
    packed = still_packed(writer.source, model, index, changed, bool(factors))
    writer.write(index, {**hf.checkpoint_tensors(model, state, apart=bool(packed)), **packed})
    _read_back(writer, model, index, own)
    if factors:
        _pass_on(layer, model, fused)
    for name in linears:
        pair = factored.get_submodule(name)
        _weight(layer, name).copy_(pair.dense())
    return edit


def _weight(layer: nn.Module, name: str) -> Tensor:
    module: Any = layer.get_submodule(name)
    found: Tensor = module.weight
    return found


def _matrices(layer: nn.Module, model: PreTrainedModel) -> set[str]:
    """The names of all matrices of the layer's experts."""
    return {matrix.name for matrix in layer_matrices(layer, family_of(model.config), ("experts",))}


def _read_back(writer: CheckpointWriter, model: PreTrainedModel, index: int, own: Mapping[str, Tensor]) -> None:
    """Let factors in memory be those of the file, which may hold them in another dtype; only there may they differ."""
    stored_as = {id(tensor): name for name, tensor in hf.checkpoint_tensors(model, own).items()}
    with writer.read(index) as tensors:
        for name, tensor in own.items():
            stored = tensors[stored_as[id(tensor)]][...]
            assert torch.equal(stored.to(tensor), tensor.to(stored.dtype).to(tensor)), f"layer {index}: {name}"
            tensor.copy_(stored)


def _view(layer: nn.Module, model: PreTrainedModel) -> MoEView:
    view = moe_view(layer, family_of(model.config))
    assert view is not None
    return view


def _pass_on(layer: nn.Module, model: PreTrainedModel, fused: Any) -> None:
    for part, stack_EOI in _view(layer, model).stacks().items():
        for number, expert in enumerate(fused.separate):
            held = expert[CHILDREN[part]]
            if not isinstance(held, ExpertMatrix):
                stack_EOI[number].copy_(held.dense())
