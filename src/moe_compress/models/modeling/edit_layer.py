"""Edits on one decoder layer: its experts, its routing, its sub-layers. For real and meta tensors alike.

Shipped with edited_model.py inside every edited checkpoint, so it needs torch alone. T tokens, K experts per token,
D model width, N novices (constants that dropped experts leave behind).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activation_rounding import round_inputs, rounding_of
from .expert_forward import as_matrix, round_experts, separate
from .factored_experts import SHARED, FactoredLinear, factored_room, shared_room
from .packed_linear import PackedMatrix, expect_rounded
from .rerouting import NOVICES, hook_rerouting, rerouting_of
from .unfused_experts import (
    CHILDREN,
    UNFUSED,
    expert_count,
    is_separate,
    model_width,
    narrow,
    own_tensor,
    places,
    stack_path,
    stacks,
)
from .unfused_experts import widths as widths_of

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_total_experts", "out_features")
WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_dim")


# --- experts ------------------------------------------------------------------------------------------------


def keep_experts(
    layer: nn.Module,
    names: Mapping[str, Any],
    *,
    experts: Sequence[int],
    novices: bool = False,
    active: float | None = None,
    outputs: Tensor | None = None,
) -> None:
    """Cut one MoE block down to `experts`, in that order: weights, router rows and biases together.

    With `novices` the router stays whole and each dropped expert leaves a constant behind, its row of `outputs`;
    `active`: how many of the experts that stay a token then uses on average.
    """
    fused: Any = layer.get_submodule(names["experts"])
    count = expert_count(fused)
    gone = [e for e in range(count) if e not in set(experts)]
    target: dict[int, int] = {old: new for new, old in enumerate(experts)}
    kept_novices = _novice_count(layer, names)
    target |= {count + n: len(experts) + n for n in range(kept_novices)}
    if novices:
        target |= {old: len(experts) + kept_novices + n for n, old in enumerate(gone)}
        _add_novices(layer, names, len(gone), outputs)
    _retarget(layer, names, target, len(experts) + kept_novices + (len(gone) if novices else 0))
    _select(fused, count, experts, dims=(0,))
    if is_separate(fused):
        fused.register_module(UNFUSED, nn.ModuleList([fused.separate[e] for e in experts]))
    rerouting_of(fused)["active"] = active if active is not None else rerouting_of(fused)["active"]


def mask_experts(layer: nn.Module, names: Mapping[str, Any], *, experts: Sequence[int]) -> None:
    """Route as if only `experts` were there, while their weights stay where they are: nothing large is copied."""
    fused: Any = layer.get_submodule(names["experts"])
    count = expert_count(fused)
    ends = count + _novice_count(layer, names)
    _retarget(layer, names, {end: end for end in (*experts, *range(count, ends))}, ends)


def merge_experts(
    layer: nn.Module,
    names: Mapping[str, Any],
    *,
    groups: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    router: str,
    aligned: bool = False,
) -> None:
    """Replace each group of experts by its weighted mean (`aligned`: their neurons were put in one order before).

    router="centroid": each group answers to the router row of its first member; "sum": to the rows of all its
    members, so that a token's gates for them add up.
    """
    fused: Any = layer.get_submodule(names["experts"])
    count, novices = expert_count(fused), _novice_count(layer, names)
    members = groups if router == "sum" else [group[:1] for group in groups]
    target = {old: new for new, group in enumerate(members) for old in group}
    target |= {count + n: len(groups) + n for n in range(novices)}
    _retarget(layer, names, target, len(groups) + novices)
    for name, tensor in fused._parameters.items():
        if tensor is not None and name != NOVICES and tensor.shape[0] == count:
            means = [_weighted_mean(tensor, group, shares) for group, shares in zip(groups, weights, strict=True)]
            fused._parameters[name] = nn.Parameter(torch.stack(means), requires_grad=False)
    _set_counts(fused, count, len(groups))


def _weighted_mean(tensor: Tensor, group: Sequence[int], shares: Sequence[float]) -> Tensor:
    """Mean over a group in fp32; an expert alone stays what it is to the last bit."""
    if len(group) == 1:
        return tensor.detach()[group[0]]
    total = sum(shares)
    mean = torch.zeros(tensor.shape[1:], dtype=torch.float32, device=tensor.device)
    for member, share in zip(group, shares, strict=True):
        mean += tensor.detach()[member].float() * (share / total)
    return mean.to(tensor.dtype)


def _novice_count(layer: nn.Module, names: Mapping[str, Any]) -> int:
    novices = layer.get_submodule(names["experts"])._parameters.get(NOVICES)
    return 0 if novices is None else len(novices)


def _add_novices(layer: nn.Module, names: Mapping[str, Any], count: int, outputs: Tensor | None) -> None:
    fused: Any = layer.get_submodule(names["experts"])
    own, width = own_tensor(fused), model_width(fused)
    rows = torch.empty(count, width, dtype=own.dtype, device=own.device) if outputs is None else outputs.to(own)
    earlier = fused._parameters.get(NOVICES)
    rows = rows if earlier is None else torch.cat([earlier.detach(), rows])
    fused.register_parameter(NOVICES, nn.Parameter(rows, requires_grad=False))


def _retarget(layer: nn.Module, names: Mapping[str, Any], target: Mapping[int, int], ends: int) -> None:
    """Send every router row that led to expert `old` to `target[old]`; rows that lead nowhere go."""
    fused: Any = layer.get_submodule(names["experts"])
    rerouted = rerouting_of(fused)
    row_count = len(rerouted["alias"] or range(expert_count(fused)))
    led = rerouted["alias"] or list(range(row_count))
    rows = [row for row in range(row_count) if led[row] in target]
    alias = [target[led[row]] for row in rows]
    _select(layer.get_submodule(names["block"]), row_count, rows, dims=(0,), flat_only=True)
    spare = names.get("spare_rows", 0)
    for module in layer.get_submodule(names["router"]).modules():
        _select(module, row_count, rows, dims=(0, 1))
        if spare:
            _select(module, row_count + spare, [*rows, *range(row_count, row_count + spare)], dims=(0,))
    plain = alias == list(range(len(alias))) and len(alias) == ends and not _novice_count(layer, names)
    rerouted["alias"] = None if plain else alias
    hook_rerouting(layer.get_submodule(names["experts"]))


def _select(module: nn.Module, count: int, kept: Sequence[int], dims: tuple[int, ...], flat_only: bool = False) -> None:
    """Select along the first of `dims` that has `count` entries, in every tensor that the module itself owns."""
    if list(kept) == list(range(count)):
        return
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is None or name == NOVICES or (flat_only and tensor.dim() != 1):
                continue
            dim = next((d for d in dims if d < tensor.dim() and tensor.shape[d] == count), None)
            if dim is None:
                continue
            index = torch.tensor(kept, device=tensor.device)
            part = tensor.detach().index_select(dim, index)
            table[name] = nn.Parameter(part, requires_grad=False) if table is module._parameters else part
    _set_counts(module, count, len(kept))


def _set_counts(module: nn.Module, before: int, after: int, attributes: Sequence[str] = COUNTS) -> None:
    for attribute in attributes:
        if module.__dict__.get(attribute) == before:
            setattr(module, attribute, after)


def keep_channels(
    layer: nn.Module, names: Mapping[str, Any], *, width: int, widths: Sequence[int] | None = None
) -> None:
    """Keep the first `width` inner neurons of every expert of one MoE block, or of each expert its own number."""
    fused, block = layer.get_submodule(names["experts"]), layer.get_submodule(names["block"])
    inner = max(widths_of(fused))
    if widths is not None:
        separate(block, fused)
        narrow(fused, widths)
    else:
        _narrow_alike(fused, inner, width)
    for module in (fused, block):
        _set_counts(module, inner, width, WIDTHS)


def _narrow_alike(fused: Any, inner: int, width: int) -> None:
    transposed = getattr(fused, "is_transposed", True)
    both = [*range(width)]
    if getattr(fused, "has_gate", True):
        concatenated = getattr(fused, "is_concatenated", True)
        both = [*both, *range(inner, inner + width)] if concatenated else [*range(2 * width)]
    for name, tensor in fused._parameters.items():
        if tensor is None or name in (NOVICES, "down_proj_bias"):
            continue
        down = name.startswith("down")
        dim = 1 if tensor.dim() == 2 or down == transposed else 2
        index = torch.tensor(both[:width] if down else both, device=tensor.device)
        fused._parameters[name] = nn.Parameter(tensor.detach().index_select(dim, index), requires_grad=False)


def pack_matrices(
    layer: nn.Module, names: Mapping[str, Any], *, bits: Mapping[str, Sequence[int]], spans: Mapping[str, int]
) -> None:
    """Put room for codes and scales in the place of matrices: of every expert's, or of linear maps."""
    for name, widths in bits.items():
        path = stack_path(names["experts"], name)
        if path:
            fused: Any = layer.get_submodule(names["experts"])
            separate(layer.get_submodule(names["block"]), fused)
            for (holder, child), width in zip(places(fused, path), widths, strict=True):
                dense: Any = holder.get_submodule(child)
                holder.register_module(child, PackedMatrix.empty(dense.weight, width, spans[name], dense.bias))
        else:
            linear: Any = layer.get_submodule(name)
            matrix = PackedMatrix.empty(linear.weight, widths[0], spans[name], linear.bias)
            matrix.groups = getattr(linear, "n_groups", 1)
            if rounding_of(linear):
                round_inputs(matrix)
            layer.set_submodule(name, matrix)
        if name.startswith(f"{names['experts']}.") and rounding_of(layer.get_submodule(names["experts"])) == "experts":
            expect_rounded(layer.get_submodule(names["experts"]))


def factor_experts(
    layer: nn.Module,
    names: Mapping[str, Any],
    *,
    forms: Mapping[str, Mapping[str, Any]] | None = None,
    linears: Mapping[str, int] | None = None,
) -> None:
    """Put room for factors in the place of the experts' matrices, by projection (gate, up, down); biases stay.

    linears: of linear maps beside them, by name within the layer, the rank.
    """
    for name, rank in (linears or {}).items():
        layer.set_submodule(name, FactoredLinear.empty(layer.get_submodule(name), rank))  # type: ignore[arg-type]
    if forms:
        _factor_routed(layer, names, forms)


def _factor_routed(layer: nn.Module, names: Mapping[str, Any], forms: Mapping[str, Mapping[str, Any]]) -> None:
    fused: Any = layer.get_submodule(names["experts"])
    matrices = stacks(fused)
    shared = {part: shared_room(matrices[part][0], form, part == "down") for part, form in forms.items()}

    def held(part: str, number: int, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        if part not in forms:
            return as_matrix(part, number, weight_OI, bias_O)
        return factored_room(weight_OI, forms[part], part == "down", number, shared[part], bias_O)

    separate(layer.get_submodule(names["block"]), fused, held)
    named = {CHILDREN[part]: found for part, found in shared.items() if len(found)}
    fused.register_module(SHARED, nn.ModuleDict(named))


def round_activations(layer: nn.Module, names: Mapping[str, Any], *, where: str) -> None:
    """Round rows to 8 bits: what experts are `sent`, all that `experts` multiply, or `all` linear maps but gates."""
    if names["experts"] in dict(layer.named_modules()):
        fused = layer.get_submodule(names["experts"])
        round_experts(layer.get_submodule(names["block"]), fused, "sent" if where == "sent" else "experts")
        if where != "sent":
            expect_rounded(fused)
    for name, module in layer.named_modules() if where == "all" else ():
        held = any(f"{name}.".startswith(f"{names[part]}.") for part in ("experts", "router"))
        if isinstance(module, nn.Linear | PackedMatrix) and module.out_features > 1 and not held:
            round_inputs(module)


# --- routing ------------------------------------------------------------------------------------------------


def set_top_k(layer: nn.Module, names: Mapping[str, Any], *, top_k: int) -> None:
    """Let every token use `top_k` experts of this layer."""
    for name in (names["block"], names["router"]):
        module: Any = layer.get_submodule(name)
        if "top_k" in module.__dict__:
            module.top_k = top_k
    rerouted = rerouting_of(layer.get_submodule(names["experts"]))
    if rerouted["active"] is not None:
        rerouted["active"] = min(rerouted["active"], top_k)


def skip_experts(
    layer: nn.Module, names: Mapping[str, Any], *, threshold: float, renormalise: bool, active: float | None = None
) -> None:
    """At run time, leave out a token's experts whose gate is below `threshold` times its largest gate.

    `renormalise`: the gates that remain are scaled to the former sum, as in models whose gates add up to one;
    `active`: how many experts a token then uses on average.
    """
    rerouted = rerouting_of(layer.get_submodule(names["experts"]))
    rerouted |= {"threshold": threshold, "renormalise": renormalise, "active": active}
    hook_rerouting(layer.get_submodule(names["experts"]))


# --- layers -------------------------------------------------------------------------------------------------


class ZeroSublayer(nn.Module):
    """In place of a sub-layer that is gone: adds nothing to the stream.

    In place of attention it still counts tokens in the cache, whose length the model reads off its first layer.
    """

    def __init__(self, outputs: int, layer_idx: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **others: Any) -> Any:
        """Zeros in the shape of the input, and None for whatever else the sub-layer returned.

        What it would have handed on to the next layer (the tokens that an indexer chose) passes as it came.
        """
        if self.layer_idx is not None and past_key_values is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(empty, empty, self.layer_idx)
        zeros = torch.zeros_like(hidden_states)
        before = next((value for name, value in others.items() if name.startswith("prev_")), None)
        return zeros if self.outputs == 1 else (zeros, *[None] * (self.outputs - 2), before)


def skip_sublayer(layer: nn.Module, names: Mapping[str, Any], *, part: str) -> None:
    """Remove the MoE block (with shared experts) or the attention of a layer, always with its norms."""
    if part == "attention":
        attention: Any = layer.get_submodule(names["attention"])
        layer.set_submodule(names["attention"], ZeroSublayer(names.get("attention_outputs", 2), attention.layer_idx))
    else:
        layer.set_submodule(names["block"], ZeroSublayer(names["outputs"]))
        for beside in names["beside"]:
            layer.set_submodule(beside, ZeroSublayer(1))
    for norm in names[f"{part}_norms"]:
        layer.set_submodule(norm, nn.Identity())
    for factor in names[f"{part}_factors"]:
        setattr(layer, factor, 1.0)


def layers_name(stack: Any) -> str:
    """What a module calls the list of decoder layers that it holds: `layers`, or its only list; empty without any."""
    lists = [name for name, child in stack.named_children() if isinstance(child, nn.ModuleList)]
    return "layers" if "layers" in lists else lists[0] if len(lists) == 1 else ""


def drop_layer(stack: Any, index: int) -> None:
    """Remove a whole decoder layer; those behind it move up."""
    name = layers_name(stack)
    setattr(stack, name, nn.ModuleList([layer for i, layer in enumerate(getattr(stack, name)) if i != index]))
    for new, layer in enumerate(getattr(stack, name)):
        for module in layer.modules():
            if module.__dict__.get("layer_idx") is not None:
                module.layer_idx = new
