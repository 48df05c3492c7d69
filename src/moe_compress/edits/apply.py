"""Carrying edits out on models and skeletons in memory, in order. E experts, F neurons of an expert."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.edits.dense_layers import is_dense_edit, make_dense
from moe_compress.edits.edits import Edit, FactorExperts, PackMatrices, to_json
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.unfused_experts import UNFUSED
from moe_compress.models.moe import MoEView, inner_width, moe_view, permute_neurons
from moe_compress.models.sublayers import block_names


def check_edits(model: PreTrainedModel, edits: Iterable[Edit]) -> None:
    """Carry edits out on a skeleton (which is used up), raising ValueError for the first that does not fit."""
    refuse_if_uneditable(model.config)
    names = block_names(model)
    for edit in edits:
        edit.check(model)
        if isinstance(edit, FactorExperts):
            apply_for_counting(model, [edit])
        else:
            carry_out(model, names, to_json(edit))


def carry_out(
    model: PreTrainedModel,
    names: Mapping[str, Any],
    edit: Mapping[str, Any],
    arrays: Mapping[str, Tensor] | None = None,
) -> None:
    """One edit, as JSON, by the code that edited checkpoints carry; none of them has layers that were made dense."""
    if is_dense_edit(edit):
        given = {key: value for key, value in edit.items() if key != "edit"}
        make_dense(hf.stack(model), family_of(model.config), **given)
    else:
        edited_model.apply(hf.stack(model), names, edit, arrays)


def refuse_if_uneditable(config: PreTrainedConfig) -> None:
    """Raise ValueError, with the reason, for a family whose experts cannot be cut."""
    family = family_of(config)
    if family.no_expert_edits:
        raise ValueError(f"experts of {family.model_type} cannot be changed: {family.no_expert_edits}.")


def apply_edits(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Carry out edits on a whole model in memory (or on a skeleton)."""
    names = block_names(model) if edits else {}
    for edit in edits:
        apply_edit(model, names, edit)


def apply_for_counting(model: PreTrainedModel, edits: Sequence[PackMatrices | FactorExperts]) -> None:
    """Make room for codes or factors on a skeleton that is only checked and counted, never filled.

    Experts of a layer that are alike are one module, named many times over: hundreds of experts in each of many layers
    would take longer to make than all that a plan has to know of them.
    """
    names, family = block_names(model) if edits else {}, family_of(model.config)
    for edit in edits:
        view = moe_view(hf.decoder_layers(model)[edit.layer], family)
        count = view.num_experts if view is not None and _alike(edit, view) else 0
        if view is None or not count:
            apply_edit(model, names, edit)
            continue
        _leave_one(view)
        first = edit
        if isinstance(edit, PackMatrices):
            first = replace(edit, bits={name: widths[:1] for name, widths in edit.bits.items()})
        apply_edit(model, names, first)
        if view.unfused:
            (one,), shared = view.experts.separate, nn.ModuleList()
            shared._modules.update({str(number): one for number in range(count)})
            view.experts.register_module(UNFUSED, shared)


def _alike(edit: PackMatrices | FactorExperts, view: MoEView) -> bool:
    """Whether the edit changes experts that are alike, and leaves them so."""
    if isinstance(edit, PackMatrices) and not any(n.startswith(f"{view.names['experts']}.") for n in edit.bits):
        return False
    if isinstance(edit, FactorExperts) and not edit.forms:
        return False
    one = not view.unfused or len({id(each) for each in view.experts.separate._modules.values()}) == 1
    return edit.alike and one


def _leave_one(view: MoEView) -> None:
    count = view.num_experts
    if view.unfused:
        view.experts.register_module(UNFUSED, nn.ModuleList([view.experts.separate[0]]))
    for name, tensor in view.experts._parameters.items():
        if tensor is not None and tensor.shape[0] == count and not view.unfused:
            view.experts._parameters[name] = nn.Parameter(tensor[:1], requires_grad=False)


def apply_edit(model: PreTrainedModel, names: Mapping[str, Any], edit: Edit) -> None:
    """Carry out one edit: neurons are put in order first, where the edit says how."""
    arrays = dict(edit.arrays)
    order_EF, kept_EW = arrays.pop("order", None), arrays.pop("channels", None)
    if (order_EF is not None or kept_EW is not None) and not next(model.parameters()).is_meta:
        view = moe_view(hf.decoder_layers(model)[edit.layer], family_of(model.config))
        assert view is not None
        permute_neurons(view, order_EF if kept_EW is None else _first(edit, inner_width(view)))
    carry_out(model, names, to_json(edit), arrays)


def _first(edit: Any, inner: int) -> Tensor:
    """All neurons of each expert in order, those that stay before the others, [E, F]."""
    kept_EW = edit.arrays["channels"].long().cpu()
    rows = []
    for row_W, width in zip(kept_EW, edit.widths or [edit.width] * len(kept_EW), strict=True):
        gone_F = torch.ones(inner, dtype=torch.bool)
        gone_F[row_W[:width]] = False
        rows.append(torch.cat([row_W[:width], gone_F.nonzero().flatten()]))
    return torch.stack(rows)


def shallow(layer: nn.Module) -> nn.Module:
    """Modules of its own, tensors shared with the layer."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})


def edits_by_layer(edits: Sequence[Edit], count: int) -> dict[int, list[Edit]]:
    """The layers of the source that are left, each with its edits in order, all by the source's numbers."""
    left: list[tuple[int, list[Edit]]] = [(index, []) for index in range(count)]
    for edit in edits:
        if edit.edit == "drop_layer":
            left.pop(edit.layer)
        else:
            index, found = left[edit.layer]
            found.append(dataclasses.replace(edit, layer=index))
    return dict(left)
