"""Edits: everything a method changes about the structure, as values that can be read, saved and replayed.

Edits are carried out in order, by `models/modeling/edited_model.py`, or `edits/dense_layers.py` where layers are made
dense, on real and meta tensors alike; each names layers and experts as they are numbered when its turn comes. E
experts, F neurons of an expert, D model width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.edits.checks import (
    require_active,
    require_alike,
    require_block,
    require_channels,
    require_earlier_choice,
    require_layer,
    require_linears,
    require_other_moe,
    require_other_part,
    require_reroutable,
    shape_of,
)
from moe_compress.edits.dense_layers import check_dense
from moe_compress.edits.factors import Form, Part, require_forms
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import inner_width, moe_views
from moe_compress.models.sublayers import attention_layers, block_names, is_whole_layer, require_other_attention

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _OnLayer:
    """What all edits have: a layer, and the tensors they bring along, which are kept beside the JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    layer: int
    arrays: Annotated[Any, Field(exclude=True)] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @property
    def needed_array(self) -> str | None:
        """The tensor without which the edit cannot be carried out on weights."""
        return None


@dataclass(frozen=True, slots=True)
class KeepExperts(_OnLayer):
    """Keep these routed experts of one layer, drop the others; router rows and biases go with them.

    With `novices` the router stays as it is, and each dropped expert leaves a constant: a row of arrays["outputs"].
    `active`: how many of the experts that stay a token then uses on average.
    """

    experts: tuple[int, ...]
    novices: bool = False
    active: float | None = None
    edit: Literal["keep_experts"] = field(default="keep_experts", kw_only=True)

    @property
    def needed_array(self) -> str | None:
        """The constants of dropped experts."""
        return "outputs" if self.novices else None

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer cannot work with these experts."""
        shape = shape_of(model, self.layer)
        if self.novices:
            require_reroutable(model, self.layer, "novice=mean")
            shape.require_known(self.experts)
        else:
            shape.require_ids(self.experts)
        outputs = self.arrays.get("outputs")
        gone = shape.num_experts - len(self.experts)
        wanted = (gone, shape.width)
        if outputs is not None and (tuple(outputs.shape) != wanted or not bool(outputs.isfinite().all())):
            raise ValueError(
                f"layer {self.layer}: its {gone} dropped experts need one finite row of {shape.width} outputs each."
            )
        require_active(self.layer, self.active, shape.num_experts)


@dataclass(frozen=True, slots=True)
class MergeExperts(_OnLayer):
    """Replace groups of experts by their weighted means; a group's first member is its representative.

    `aligned`: each expert's neurons are first reordered as arrays["order"] says, [E, F].
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: Literal["centroid", "sum"]
    aligned: bool = False
    edit: Literal["merge_experts"] = field(default="merge_experts", kw_only=True)

    @property
    def needed_array(self) -> str | None:
        """The order of neurons."""
        return "order" if self.aligned else None

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless the groups share out exactly the layer's experts."""
        shape = shape_of(model, self.layer)
        members = [expert for group in self.groups for expert in group]
        if sorted(members) != list(range(shape.num_experts)) or not all(self.groups):
            raise ValueError(
                f"layer {self.layer}: groups must share out its {shape.num_experts} experts, each once; "
                f"this plan has {[list(group) for group in self.groups]}."
            )
        sizes = [len(group) for group in self.groups]
        if [len(w) for w in self.weights] != sizes or not all(0 <= s < math.inf for w in self.weights for s in w):
            raise ValueError(f"layer {self.layer}: every member of a group needs one weight, from 0 up.")
        if not all(0 < sum(w) < math.inf for w in self.weights):
            raise ValueError(f"layer {self.layer}: weights of a group must add up to a number above 0.")
        require_alike(model, self.layer, "to merge them")
        self._check_order(model)
        if self.router == "centroid":
            shape.require_ids(tuple(group[0] for group in self.groups))
        else:
            require_reroutable(model, self.layer, "router=sum")

    def _check_order(self, model: PreTrainedModel) -> None:
        order_EF = self.arrays.get("order")
        if order_EF is None:
            return
        view = moe_views(model)[self.layer]
        wanted = (view.num_experts, inner_width(view))
        places_EF = torch.arange(wanted[1]).expand(wanted)
        whole = not order_EF.is_floating_point() and tuple(order_EF.shape) == wanted
        if not whole or not torch.equal(order_EF.sort(1).values.long(), places_EF):
            raise ValueError(
                f"layer {self.layer}: the order of neurons must be a permutation for each expert, {wanted}."
            )


@dataclass(frozen=True, slots=True)
class SkipSublayer(_OnLayer):
    """Remove the MoE block (with its shared experts) or the attention of one layer, always with its norms."""

    part: Literal["moe", "attention"]
    edit: Literal["skip_sublayer"] = field(default="skip_sublayer", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer has no such part, or the model no other layer with experts."""
        if self.part == "moe":
            shape_of(model, self.layer)
            require_block(model, self.layer)
            require_other_part(model, self.layer)
            require_other_moe(model, self.layer)
            if is_whole_layer(hf.decoder_layers(model)[self.layer], family_of(model.config), block_names(model)):
                raise ValueError(f"layer {self.layer} is nothing but its MoE block: drop the layer (block_drop).")
            return
        with_attention = attention_layers(model)
        if self.layer not in with_attention:
            raise ValueError(
                f"layer {self.layer} has no attention that could be removed; those that have: {with_attention}."
            )
        require_other_attention(model, self.layer)
        require_other_part(model, self.layer)
        require_earlier_choice(model, self.layer, "its attention")


@dataclass(frozen=True, slots=True)
class DropLayer(_OnLayer):
    """Remove a whole decoder layer; the layers behind it move up by one."""

    edit: Literal["drop_layer"] = field(default="drop_layer", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if there is no such layer or it is the last one with experts or with attention."""
        require_layer(model, self.layer)
        require_other_moe(model, self.layer)
        require_other_attention(model, self.layer)
        require_earlier_choice(model, self.layer, "it")


@dataclass(frozen=True, slots=True)
class SetTopK(_OnLayer):
    """Let every token use `top_k` experts of one layer."""

    top_k: int
    edit: Literal["set_top_k"] = field(default="set_top_k", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the router cannot choose that many."""
        shape = shape_of(model, self.layer)
        if shape.fixed_top_k:
            raise ValueError(f"the router of {model.config.model_type} always uses {shape.top_k} experts.")
        shape.require_top_k(self.top_k)


@dataclass(frozen=True, slots=True)
class SkipExperts(_OnLayer):
    """At run time, leave out experts whose gate is below `threshold` times the token's largest (NAEE).

    `active`: how many experts a token then uses on average.
    """

    threshold: float
    renormalise: bool
    active: float | None = None
    edit: Literal["skip_experts"] = field(default="skip_experts", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the threshold is no fraction or experts cannot be skipped here."""
        shape = shape_of(model, self.layer)
        require_active(self.layer, self.active, shape.num_experts)
        require_reroutable(model, self.layer, "skip")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"layer {self.layer}: a threshold is a fraction from 0 to 1, not {self.threshold}.")


@dataclass(frozen=True, slots=True)
class KeepChannels(_OnLayer):
    """Keep `width` inner neurons of every expert of one layer: those of arrays["channels"], [E, width].

    With `widths`, one for each expert and none above `width`, only the first so many of an expert's row count.
    """

    width: int
    widths: tuple[int, ...] | None = None
    edit: Literal["keep_channels"] = field(default="keep_channels", kw_only=True)

    @property
    def needed_array(self) -> str | None:
        """Which neurons of each expert stay."""
        return "channels"

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError for a width that the layer, or the kernels that run it, cannot have."""
        shape_of(model, self.layer)
        require_alike(model, self.layer, "to make them narrower")
        require_channels(model, self.layer, self.width, self.widths, self.arrays.get("channels"))


@dataclass(frozen=True, slots=True)
class PackMatrices(_OnLayer):
    """Hold matrices of one layer in few bits: by name, the bits of each in a stack, and how many inputs share a scale.

    What the codes are, only a checkpoint knows: the edit makes room for them.
    """

    bits: dict[str, tuple[int, ...]]
    spans: dict[str, int]
    edit: Literal["pack_matrices"] = field(default="pack_matrices", kw_only=True)

    @property
    def alike(self) -> bool:
        """Whether all matrices of a stack have the same bits."""
        return all(len(set(widths)) == 1 for widths in self.bits.values())

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer has no such matrices."""
        require_layer(model, self.layer)


@dataclass(frozen=True, slots=True)
class FactorExperts(_OnLayer):
    """Hold projections of one layer's experts in factors, each in a form of its own; the others stay as they are.

    linears: the ranks of linear maps beside them (shared experts), by name within the layer. What the factors are, only
    a checkpoint knows: the edit makes room for them.
    """

    forms: dict[Part, Form] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    edit: Literal["factor_experts"] = field(default="factor_experts", kw_only=True)

    @property
    def alike(self) -> bool:
        """Whether all experts of a projection have the same rank."""
        return all(isinstance(form.rank, int) for form in self.forms.values())

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer has no such projections, or they cannot be held so."""
        shape_of(model, self.layer)
        require_linears(model, self.layer, self.linears)
        if self.forms or not self.linears:
            require_alike(model, self.layer, "to hold them in factors")
            require_forms(moe_views(model)[self.layer], self.layer, self.forms)


@dataclass(frozen=True, slots=True)
class RoundActivations(_OnLayer):
    """Round rows of one layer to 8 bits: what experts are sent, all that experts multiply, or all but routers."""

    where: Literal["sent", "experts", "all"]
    edit: Literal["round_activations"] = field(default="round_activations", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer has no experts, and nothing else is to be rounded."""
        require_layer(model, self.layer)
        if self.where != "all":
            shape_of(model, self.layer)


@dataclass(frozen=True, slots=True)
class MakeDense(_OnLayer):
    """Put one MLP in the place of one layer's MoE block: these experts side by side, the output of each times its gate.

    Shared experts join them with the gate `shared`; zeros fill it up to `width`. Of a layer without experts, its own
    MLP is made that wide.
    """

    experts: tuple[int, ...]
    gates: tuple[float, ...]
    width: int
    shared: float = 1.0
    edit: Literal["make_dense"] = field(default="make_dense", kw_only=True)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the layer cannot become such an MLP."""
        check_dense(model, self.layer, self.experts, self.gates, self.shared, self.width)


Edit = (
    KeepExperts | MergeExperts | SkipSublayer | DropLayer | SetTopK | SkipExperts | KeepChannels | PackMatrices
    | FactorExperts | RoundActivations | MakeDense
)  # fmt: skip
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Annotated[Edit, Field(discriminator="edit")])


@dataclass(frozen=True)
class Plan:
    """What a method decided: edits, the scores [layer][expert] behind them, and what should be reported."""

    edits: list[Edit]
    scores: dict[int, list[float | None]]
    report: dict[str, Any]


# --- as JSON ------------------------------------------------------------------------------------------------


def to_json(edit: Edit) -> dict[str, Any]:
    """An edit as a JSON object, without its arrays."""
    names = [f.name for f in fields(edit) if f.name not in ("edit", "arrays")]
    given = {name: _listed(getattr(edit, name)) for name in names}
    return {"edit": edit.edit, **{name: value for name, value in given.items() if name != "linears" or value}}


def _listed(value: Any) -> Any:
    if isinstance(value, Form):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def from_json(values: Mapping[str, Any], arrays: Arrays | None = None) -> Edit:
    """An edit from a JSON object; ValueError says what is wrong with it."""
    try:
        edit: Edit = _ADAPTER.validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(f"the edit {dict(values)} is not valid: {where}: {first['msg'].lower()}.") from error
    return replace(edit, arrays=dict(arrays or {}))


def removals(layers: Sequence[int]) -> list[Edit]:
    """Edits that drop these layers, whose numbers are those before any of them is gone: from the last to the first."""
    return [DropLayer(layer) for layer in sorted(layers, reverse=True)]
