"""The numbers of a model that decide what may be dropped: layers, experts, groups, experts per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.dense_mlp import dense_widths, of_mlp, shared_experts
from moe_compress.models.families import experts_per_token, family_of, groups_of, made_dense_from
from moe_compress.models.modeling.rerouting import REROUTE
from moe_compress.models.modeling.unfused_experts import model_width
from moe_compress.models.moe import MoEView, inner_width, moe_views
from moe_compress.models.sublayers import attention_layers, block_names, is_whole_layer, lost_part, mixing_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """The numbers that decide what may be dropped from one layer's MoE block.

    width: of the model; inner: neurons of an expert; shared: of its shared experts together.
    """

    layer: int
    num_experts: int
    top_k: int
    active: float | None = None
    width: int = 0
    inner: int = 0
    shared: int = 0
    groups: int = 1
    groups_used: int = 1
    min_per_group: int = 1
    fixed_top_k: bool = False
    aliased: bool = False
    novices: bool = False
    rerouted: bool = False

    def require(self, kept: int) -> None:
        """Raise ValueError unless the layer still works with `kept` experts (equally many in every group)."""
        where = f"layer {self.layer}"
        if not 0 < kept <= self.num_experts:
            raise ValueError(f"{where} has {self.num_experts} experts, so keep={kept} is not possible.")
        if kept < self.top_k:
            raise ValueError(
                f"keep={kept} is fewer than the {self.top_k} experts each token uses: keep at least {self.top_k}."
            )
        if self.groups == 1:
            return
        reachable = self.groups_used * (kept // self.groups)
        if kept % self.groups or kept // self.groups < self.min_per_group or reachable < self.top_k:
            raise ValueError(
                f"{where} routes within {self.groups} groups and each token sees {self.groups_used} of them, so "
                f"keep={kept} is not possible: {self._allowed()}."
            )

    def _allowed(self) -> str:
        return f"possible counts are {', '.join(map(str, range(self.floor, self.num_experts + 1, self.groups)))}"

    @property
    def floor(self) -> int:
        """Fewest experts with which the layer still works."""
        if self.groups == 1:
            return self.top_k
        per_group = max(self.min_per_group, -(-self.top_k // self.groups_used))
        return per_group * self.groups

    def require_top_k(self, top_k: int) -> None:
        """Raise ValueError unless each token may use `top_k` experts."""
        reachable = self.groups_used * (self.num_experts // self.groups)
        if not 1 <= top_k <= reachable:
            raise ValueError(f"layer {self.layer} cannot use {top_k} experts per token: 1 to {reachable} are possible.")

    def require_known(self, kept: tuple[int, ...]) -> None:
        """Raise ValueError unless these are ascending ids of experts."""
        if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < self.num_experts:
            raise ValueError(
                f"layer {self.layer}: kept experts must be ascending ids below {self.num_experts}, not {list(kept)}."
            )

    def require_ids(self, kept: tuple[int, ...]) -> None:
        """Raise ValueError unless exactly these experts may stay."""
        self.require_known(kept)
        if self.aliased and self.groups > 1:
            raise ValueError(
                f"layer {self.layer} was merged with router=sum and routes within groups: no more experts can go."
            )
        self.require(len(kept))
        size = self.num_experts // self.groups
        per_group = [sum(g * size <= e < (g + 1) * size for e in kept) for g in range(self.groups)]
        if len(set(per_group)) > 1:
            raise ValueError(
                f"layer {self.layer} routes within {self.groups} groups, which must keep equally many experts; "
                f"this plan keeps {per_group}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """moe: the layers with experts; total: all decoder layers; whole_layers: a MoE block is a layer of its own;
    attention: the layers whose attention could be removed; mixing: all in which tokens attend to others; halved:
    those that have lost their MoE block or their attention already; dense: neurons of the MLP of each layer without
    experts.
    """

    moe: list[MoEShape]
    total: int
    whole_layers: bool = False
    attention: list[int] = field(default_factory=list)
    mixing: list[int] = field(default_factory=list)
    halved: list[int] = field(default_factory=list)
    dense: Mapping[int, int] = field(default_factory=dict)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The numbers of a model or a skeleton. ValueError if it has no layer with experts that can be told apart."""
    if origin := made_dense_from(model.config):
        raise ValueError(f"this model has no experts: its layers were made dense of those of a {origin} model.")
    shapes = moe_shapes(model)
    if not shapes:
        raise ValueError(f"{type(model).__name__} has no layer whose experts can be told apart.")
    layers = hf.decoder_layers(model)
    whole = is_whole_layer(layers[shapes[0].layer], family_of(model.config), block_names(model))
    attention, mixing = attention_layers(model), mixing_layers(model)
    halved = [index for index, layer in enumerate(layers) if lost_part(layer)]
    return ModelShape(
        moe=shapes,
        total=len(layers),
        whole_layers=whole,
        attention=attention,
        mixing=mixing,
        halved=halved,
        dense=dense_widths(layers, family_of(model.config)),
    )


def moe_shapes(model: PreTrainedModel) -> list[MoEShape]:
    """The MoE blocks of a model as numbers; a skeleton is enough."""
    return [moe_shape(model, index, view) for index, view in moe_views(model).items()]


def moe_shape(model: PreTrainedModel, index: int, view: MoEView) -> MoEShape:
    """One MoE block as numbers."""
    config = model.config.get_text_config()
    family = family_of(config)
    groups, groups_used = groups_of(config)
    beside = (of_mlp(mlp) for mlp in shared_experts(hf.decoder_layers(model)[index], view, family).values())
    return MoEShape(
        layer=index,
        num_experts=view.num_experts,
        top_k=view.top_k or experts_per_token(config),
        active=view.active,
        width=model_width(view.experts),
        inner=inner_width(view),
        shared=sum(part.count for part in beside if part is not None),
        groups=groups,
        groups_used=groups_used,
        min_per_group=family.min_per_group,
        fixed_top_k=family.fixed_top_k,
        aliased=view.router_rows != view.num_experts,
        novices=view.row_to_expert is not None and max(view.row_to_expert) >= view.num_experts,
        rerouted=view.row_to_expert is not None or view.experts.__dict__.get(REROUTE, {}).get("threshold") is not None,
    )
