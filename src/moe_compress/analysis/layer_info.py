"""What there is to compress: the MoE layers of a model, and the numbers of one of them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import MoEView, moe_views
from moe_compress.models.shape import MoEShape, moe_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayerInfo:
    """One MoE layer in numbers. expert_params: of one routed expert; router_params: of the router, for one expert;
    shared_params: of the experts that every token uses; floor: fewest experts with which the router still works.
    """

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    router_groups: int
    router_groups_per_tok: int
    router_scores: str
    floor: int
    expert_params: int
    router_params: int
    shared_params: int
    architecture: str

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token also uses an expert that is not routed."""
        return self.shared_params > 0


class MoEHooks:
    """Where a model keeps its experts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        hf.complete_experts(model)

    @property
    def moe_layer_indices(self) -> list[int]:
        """The layers with routed experts."""
        return list(moe_views(self.model))


def view_of(model: PreTrainedModel, layer_idx: int) -> MoEView:
    """The MoE block of a layer; ValueError if the layer is not there or has none."""
    hf.complete_experts(model)
    views, count = moe_views(model), len(hf.decoder_layers(model))
    if layer_idx not in views:
        what = "has no experts" if 0 <= layer_idx < count else f"is not there: layers are 0 to {count - 1}"
        raise ValueError(f"layer {layer_idx} {what}; MoE layers: {', '.join(map(str, views))}.")
    return views[layer_idx]


def shape_of(model: PreTrainedModel, layer_idx: int) -> MoEShape:
    """What the layer's router allows."""
    return moe_shape(model, layer_idx, view_of(model, layer_idx))


def get_moe_layer_info(model: PreTrainedModel, layer_idx: int) -> MoELayerInfo:
    """The numbers of one MoE layer; ValueError if the layer is not there or has no experts."""
    view, shape = view_of(model, layer_idx), shape_of(model, layer_idx)
    layer = hf.decoder_layers(model)[layer_idx]
    return MoELayerInfo(
        layer_idx=layer_idx,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        router_groups=shape.groups,
        router_groups_per_tok=shape.groups_used,
        router_scores=family_of(model.config).router_scores,
        floor=shape.floor,
        expert_params=sum(p.numel() for p in view.experts.parameters()) // shape.num_experts,
        router_params=_router_params(view),
        shared_params=sum(p.numel() for name, p in layer.named_parameters() if "shared" in name),
        architecture=model.config.model_type,
    )


def _router_params(view: MoEView) -> int:
    """Parameters of router and block that leave with an expert: a row of every tensor with a row an expert."""
    flat = [p for p in view.block._parameters.values() if p is not None and p.dim() == 1]
    rows = [p for p in (*view.router.parameters(), *flat) if view.router_rows in p.shape[:2]]
    return sum(p.numel() for p in rows) // view.router_rows
