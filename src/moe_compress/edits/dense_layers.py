"""Making layers dense, in memory and on skeletons: one MLP in the place of experts, or of a narrower MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.dense_mlp import (
    DenseMLP,
    Neurons,
    dense_mlp,
    joined,
    of_experts,
    of_mlp,
    shared_experts,
    shared_gate,
)
from moe_compress.models.families import Family, family_of
from moe_compress.models.modeling.edit_layer import ZeroSublayer
from moe_compress.models.moe import MoEView, moe_view
from moe_compress.models.shape import moe_shape
from moe_compress.models.sublayers import within

MAKE_DENSE = "make_dense"


def require_dense_family(family: Family) -> None:
    """Raise ValueError for a family of which no architecture without experts is known."""
    if not family.dense_as:
        raise ValueError(
            f"{family.model_type} cannot be made dense: no architecture of transformers is known here that has its "
            "attention and norms, and an MLP in the place of its experts."
        )


def check_dense(
    model: PreTrainedModel, layer: int, experts: Sequence[int], gates: Sequence[float], shared: float, width: int
) -> None:
    """Raise ValueError if the layer cannot become an MLP of these experts, as wide as this."""
    family, found = family_of(model.config), hf.decoder_layers(model)
    require_dense_family(family)
    if not 0 <= layer < len(found):
        raise ValueError(f"the plan makes layer {layer} dense, but there are layers 0 to {len(found) - 1}.")
    if len(gates) != len(experts) or not all(math.isfinite(gate) for gate in (*gates, shared)):
        raise ValueError(f"layer {layer}: each of its {len(experts)} experts needs a gate, a finite number.")
    view = moe_view(found[layer], family)
    if view is None:
        if experts:
            raise ValueError(f"the plan makes layer {layer} dense of experts {list(experts)[:5]}, and it has none.")
    else:
        _require_whole(model, layer, view, experts)
    neurons = sum(part.count for part in _parts(found[layer], view, family, experts, gates, shared))
    if neurons > width:
        raise ValueError(f"layer {layer}: {neurons} neurons do not fit into an MLP of width={width}.")


def _require_whole(model: PreTrainedModel, layer: int, view: MoEView, experts: Sequence[int]) -> None:
    """Raise ValueError unless an MLP can hold all that the block does with some of its experts."""
    shape, found, family = moe_shape(model, layer, view), hf.decoder_layers(model)[layer], family_of(model.config)
    if not experts:
        raise ValueError(f"layer {layer} has experts: name those that it is made dense of.")
    shape.require_known(tuple(experts))
    if view.by_table:
        raise ValueError(f"layer {layer} looks its experts up by token: no fixed gates stand for that.")
    if shape.novices:
        raise ValueError(f"layer {layer} holds constants in place of experts, for which an MLP has no room.")
    gate, held = shared_gate(view), [view.names["experts"], view.names["router"], *shared_experts(found, view, family)]
    for name, module in found.get_submodule(view.names["block"]).named_modules():
        full = f"{view.names['block']}.{name}".strip(".")
        matrix = any(each is not None and each.dim() > 1 for each in module._parameters.values())
        if matrix and module is not gate and not any(within(full, place) for place in held):
            raise ValueError(f"layer {layer}: {full} is no part of a MoE block that an MLP could stand for.")
    beside = [name for name, _ in found.named_children() if name in family.beside and name not in held]
    if beside:
        raise ValueError(f"layer {layer}: {beside[0]} beside its experts is no MLP that could be joined to them.")


def _parts(
    layer: nn.Module,
    view: MoEView | None,
    family: Family,
    experts: Sequence[int],
    gates: Sequence[float],
    shared: float,
) -> list[Neurons]:
    """What the MLP is made of: the experts, then the shared ones; of a layer without experts, its own MLP."""
    if view is None:
        found = dense_mlp(layer, family)
        neurons = of_mlp(found[1]) if found is not None else None
        if neurons is None:
            raise ValueError("a layer without experts has no gated MLP without biases, which could be made wider.")
        return [neurons]
    beside = (of_mlp(mlp) for mlp in shared_experts(layer, view, family).values())
    return [of_experts(view, experts, gates), *(part.scaled(shared) for part in beside if part is not None)]


def make_dense(
    stack: Any,
    family: Family,
    *,
    layer: int,
    experts: Sequence[int],
    gates: Sequence[float],
    width: int,
    shared: float = 1.0,
) -> None:
    """Put one MLP in the place of a layer's MoE block and of what runs beside it, or of its dense MLP."""
    found = stack.layers[layer]
    view = moe_view(found, family)
    parts = _parts(found, view, family, experts, gates, shared)
    before: Any = dense_mlp(found, family) if view is None else (view.names["block"], view.experts)
    name, computing = before
    dense = DenseMLP(joined(parts, width), computing.act_fn).train(found.training)
    for beside in (child for child in family.beside if child in dict(found.named_children()) and view is not None):
        found.set_submodule(beside, ZeroSublayer(1))
    found.set_submodule(name, dense)


def is_dense_edit(values: Mapping[str, Any]) -> bool:
    """Whether an edit, as JSON, makes a layer dense."""
    return values.get("edit") == MAKE_DENSE
