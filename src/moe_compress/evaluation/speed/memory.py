"""What a running model holds and reads: tensors of its weights and of its cache, and the bytes that a step touches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_compress.models import hf
from moe_compress.models.modeling.factored_experts import SparseMatrix
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import all_moe_views


def cache_tensors(cache: Any) -> list[Tensor]:
    """What a cache of keys and values, or of recurrent states, keeps."""
    return [tensor for layer in getattr(cache, "layers", ()) for value in vars(layer).values() for tensor in _in(value)]


def _in(value: Any) -> list[Tensor]:
    """The tensors in a value, which may hold them by name or by number."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _in(each)]


def weight_tensors(module: nn.Module) -> list[Tensor]:
    """Weights as they lie in memory, kernels' layouts included, every storage once."""
    tensors: list[Tensor] = [*module.parameters()]
    for part in module.modules():
        if isinstance(part, SparseMatrix):
            tensors.append(part.mask)
        if isinstance(part, PackedMatrix) and part.kernel is not None:
            tensors += part.kernel.tensors()
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


def step_bytes(model: Any, batch: int) -> float:
    """Expected bytes of weights that one step reads for `batch` sequences that choose their experts alone."""
    table = model.get_input_embeddings()
    whole = {id(tensor): 1.0 for tensor in weight_tensors(model)}
    if table.weight is not getattr(model.get_output_embeddings(), "weight", None):
        whole[id(table.weight)] = batch / len(table.weight)
    for view in all_moe_views(model).values():
        every = hf.gate_on_input(view.experts) and not view.unfused  # as stock transformers runs Llama-4's
        used = view.num_experts if every or not view.active else min(view.active, view.num_experts)
        share = 1 - (1 - used / view.num_experts) ** batch
        # What experts in factors have in common is read whatever is chosen.
        chosen = view.experts.separate if view.factored else view.experts
        whole |= {id(tensor): share for tensor in weight_tensors(chosen)}
    return sum(tensor.numel() * tensor.element_size() * whole[id(tensor)] for tensor in weight_tensors(model))
