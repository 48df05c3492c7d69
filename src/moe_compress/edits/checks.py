"""What edits ask of a model before they are carried out; a skeleton is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import MoEView, inner_width, moe_view, moe_views
from moe_compress.models.shape import MoEShape, moe_shape
from moe_compress.models.sublayers import lost_part

# Edits of one layer: more than any recipe makes, and few enough to be carried out at once.
MOST_EDITS = 64
# Grouped products need rows of a whole number of 16 bytes, in 16-bit arithmetic too.
WIDTH_STEP = 8


def require_few(edits: int, num_layers: int, what: str) -> None:
    """Raise ValueError for more edits than a model of so many layers can have."""
    most = MOST_EDITS * num_layers
    if edits > most:
        raise ValueError(f"{what} are {edits}, and at most {most} are read")


def shape_of(model: PreTrainedModel, layer: int) -> MoEShape:
    """The layer's MoE block as numbers; ValueError if it has none."""
    return moe_shape(model, layer, view_of(model, layer))


def view_of(model: PreTrainedModel, layer: int) -> MoEView:
    """The layer's MoE block; ValueError if it has none."""
    layers = hf.decoder_layers(model)
    view = moe_view(layers[layer], family_of(model.config)) if 0 <= layer < len(layers) else None
    if view is None:
        raise ValueError(f"the plan edits layer {layer}, which has no experts; MoE layers: {list(moe_views(model))}.")
    if view.by_table:
        raise ValueError(f"the plan edits layer {layer}, whose experts are looked up by token: they stay as they are.")
    return view


def require_linears(model: PreTrainedModel, layer: int, ranks: Mapping[str, int]) -> None:
    """Raise ValueError for linear maps that the layer does not have, or that cannot have these ranks."""
    if ranks and family_of(model.config).joins_shared:
        raise ValueError(
            f"{model.config.model_type}: transformers joins matrices of shared experts while it reads them, so they "
            "cannot be held in factors: choose where=experts."
        )
    for name, rank in ranks.items():
        module = dict(hf.decoder_layers(model)[layer].named_modules()).get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"layer {layer}: {name} is no linear map that could be held in factors.")
        most = min(module.out_features, module.in_features)
        if not 1 <= rank <= most:
            raise ValueError(f"layer {layer}: {name} takes a rank from 1 to {most}, not {rank}.")


def require_layer(model: PreTrainedModel, layer: int) -> None:
    """Raise ValueError unless there is such a layer."""
    count = len(hf.decoder_layers(model))
    if not 0 <= layer < count:
        raise ValueError(f"the plan drops layer {layer}, but there are layers 0 to {count - 1}.")


def require_other_moe(model: PreTrainedModel, layer: int) -> None:
    """Raise ValueError if no other layer has experts."""
    if list(moe_views(model)) == [layer]:
        raise ValueError(f"layer {layer} is the only layer left with experts: without it this would be no MoE.")


def require_earlier_choice(model: PreTrainedModel, layer: int, what: str) -> None:
    """Raise ValueError if, without the layer's attention, one behind it would use what no indexer has chosen."""
    attentions = [getattr(each, "self_attn", None) for each in hf.decoder_layers(model)]
    choosing = [index for index, each in enumerate(attentions) if getattr(each, "indexer", None) is not None]
    using = [index for index, each in enumerate(attentions) if getattr(each, "skip_topk", False)]
    left = [index for index in choosing if index != layer]
    if any(index != layer and (not left or index < left[0]) for index in using):
        raise ValueError(
            f"layer {layer} chooses the tokens that layer {layer + 1} attends to: {what} cannot go unless that does."
        )


def require_block(model: PreTrainedModel, layer: int) -> None:
    """Raise ValueError if the layer's experts are no block of their own, which could be removed."""
    if view_of(model, layer).in_layer:
        raise ValueError(
            f"layer {layer} has its experts beside a dense MLP and in no block of their own, which could be removed: "
            "drop the whole layer (block_drop)."
        )


def require_other_part(model: PreTrainedModel, layer: int) -> None:
    """Raise ValueError if the layer has lost a part already."""
    if lost_part(hf.decoder_layers(model)[layer]):
        raise ValueError(f"layer {layer} has lost its other part already: drop the whole layer (block_drop).")


def require_active(layer: int, active: float | None, experts: int) -> None:
    """Raise ValueError for a mean number of experts a token that there cannot be."""
    if active is not None and not 0 <= active <= experts:
        raise ValueError(f"layer {layer}: a token uses 0 to {experts} experts on average, not active={active}.")


def require_reroutable(model: PreTrainedModel, layer: int, what: str) -> None:
    """Raise ValueError if nothing can come between the layer's router and its experts."""
    if hf.gate_on_input(view_of(model, layer).experts):
        raise ValueError(
            f"{what} is not possible for {model.config.model_type}: its block runs the experts itself, "
            "so nothing can come between router and experts."
        )


def require_alike(model: PreTrainedModel, layer: int, why: str) -> None:
    """Raise ValueError if the layer's experts are held one by one: they differ in width, are packed or in factors."""
    view = view_of(model, layer)
    if view.factored:
        raise ValueError(
            f"layer {layer}: its experts are held in factors, and have to be whole matrices {why}: put this stage "
            "before factorise."
        )
    if view.unfused:
        raise ValueError(
            f"layer {layer}: its experts differ in width or are packed, and have to be alike {why}: "
            "put this stage before the one that made them so, or use a bf16 copy of a model that is published so."
        )


def require_channels(
    model: PreTrainedModel, layer: int, width: int, widths: Sequence[int] | None, kept_EW: Tensor | None
) -> None:
    """Raise ValueError for a width that the layer, or the kernels that run it, cannot have, or for wrong neurons."""
    experts, inner = shape_of(model, layer).num_experts, inner_width(moe_views(model)[layer])
    each = [width] * experts if widths is None else list(widths)
    if len(each) != experts or max(each) != width:
        raise ValueError(f"layer {layer}: its {experts} experts need a width each, the largest of them {width}.")
    if not 0 < min(each) <= max(each) <= inner:
        raise ValueError(f"layer {layer}: its experts have {inner} neurons, so width={width} is not possible.")
    odd = next((w for w in each if w % WIDTH_STEP), None)
    if odd is not None:
        nearest = f"{odd // WIDTH_STEP * WIDTH_STEP} and {-(-odd // WIDTH_STEP) * WIDTH_STEP}"
        raise ValueError(
            f"layer {layer}: rows of {odd} numbers of 16 bits are no multiple of 16 bytes, without which no grouped "
            f"product runs: {nearest} are possible."
        )
    if kept_EW is None:
        return
    whole = not kept_EW.is_floating_point() and tuple(kept_EW.shape) == (experts, width)
    if not whole or not all(_different(row_W[:w], inner) for row_W, w in zip(kept_EW, each, strict=True)):
        raise ValueError(f"layer {layer}: each of {experts} experts needs {width} different neurons below {inner}.")


def _different(kept_W: Tensor, inner: int) -> bool:
    """Whether these are ascending numbers of neurons."""
    return bool(((kept_W >= 0) & (kept_W < inner)).all()) and bool((kept_W.diff() > 0).all())
