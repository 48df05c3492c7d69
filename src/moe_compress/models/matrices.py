"""The weight matrices of one decoder layer by kind, whatever their storage: views [B, O, I], B experts or one.

O outputs, I inputs, E experts. Writing into a view changes the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.modeling.bit_packing import parts_of_bytes
from moe_compress.models.modeling.factored_experts import SHARED, FactoredLinear, SparseMatrix
from moe_compress.models.modeling.packed_linear import is_packed
from moe_compress.models.modeling.unfused_experts import CHILDREN, UNFUSED, ExpertMatrix, places
from moe_compress.models.moe import MoEView, moe_view
from moe_compress.models.sublayers import within

Kind = Literal["experts", "shared", "attention", "dense", "router"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ALL = "all"
ROUTED, INNER, ROUTER = "routed", "inner", "router"


@dataclass(frozen=True, slots=True)
class Matrix:
    """Matrices of equal shape as one view onto the layer's storage.

    name: within the layer; source: what they multiply, `routed` (what experts see), `inner` (what their down
    projections see), `router`, or the name of their module. Matrices of one source have the same inputs.
    """

    name: str
    kind: Kind
    source: str
    weight_BOI: Tensor


def layer_matrices(layer: nn.Module, family: Family, kinds: Sequence[Kind] = KINDS) -> list[Matrix]:
    """The matrices of these kinds; embeddings, convolutions, norms and biases are none."""
    view = moe_view(layer, family)
    if view is not None and "experts" in kinds and (is_packed(view.experts) or (view.unfused and not view.factored)):
        raise ValueError(
            "experts that differ in width or are packed cannot be changed any more: put this stage before the one that "
            "made them so, or choose other parts (where=)."
        )
    found = [*_expert_matrices(view)] if view is not None else []
    names = view.names if view is not None else {"block": "", "router": ""}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not within(name, names["router"]):
            kind = _kind(layer, family, name, module, names["block"])
            found.append(Matrix(name, kind, name, module.weight.detach().unsqueeze(0)))
    return [matrix for matrix in found if matrix.kind in kinds]


def _expert_matrices(view: MoEView) -> Iterator[Matrix]:
    if view.factored and not is_packed(view.experts):
        yield from _factors(view)
    for name, stack_EOI in ({} if view.unfused else view.stacks()).items():
        source = INNER if name == "down" else ROUTED
        yield Matrix(f"{view.names['experts']}.{name}", "experts", source, stack_EOI.detach())
    yield Matrix(view.names["router"], "router", ROUTER, view.router_rows_ED.detach().unsqueeze(0))


def _factors(view: MoEView) -> Iterator[Matrix]:
    """The factors of all experts and what they share, each what nothing but itself multiplies the inputs of."""
    fused, stem = view.experts, view.names["experts"]
    for part, name in CHILDREN.items():
        if name in fused.separate[0]:
            first = fused.separate[0][name]
            named = [factor for factor in ("left", "right") if first._modules.get(factor) is not None]
            for path in [f"{part}.{factor}" for factor in named] or [part]:
                yield from _factor_stack(fused, stem, path)
    for name, module in fused.shared_parts.named_modules():
        if isinstance(module, ExpertMatrix):
            full = f"{stem}.{SHARED}.{name}"
            yield Matrix(full, "experts", full, module.weight.detach().unsqueeze(0))


def _factor_stack(fused: Any, stem: str, path: str) -> Iterator[Matrix]:
    """One matrix of every expert: as a stack, or one by one where ranks differ."""
    held: list[Any] = [holder.get_submodule(child) for holder, child in places(fused, path)]
    if len({each.weight.shape for each in held}) == 1:
        name = f"{stem}.{path}"
        yield Matrix(name, "experts", name, _as_one(held))
        return
    part, _, factor = path.partition(".")
    for number, each in enumerate(held):
        name = f"{stem}.{UNFUSED}.{number}.{CHILDREN[part]}.{factor}".rstrip(".")
        yield Matrix(name, "experts", name, each.weight.detach().unsqueeze(0))


def _as_one(held: Sequence[Any]) -> Tensor:
    """One tensor [B, O, I] that holds the weights of modules, which become views of it unless they are that already."""
    first = held[0].weight.detach()
    each, start, storage = first.numel(), first.storage_offset(), first.untyped_storage()
    joined = not first.is_meta and all(
        module.weight.is_contiguous()
        and module.weight.untyped_storage().data_ptr() == storage.data_ptr()
        and module.weight.storage_offset() == start + b * each
        for b, module in enumerate(held)
    )
    if joined:
        return first.as_strided((len(held), *first.shape), (each, *first.stride()), start)
    stack_BOI = torch.stack([module.weight.detach() for module in held])
    for module, weight_OI in zip(held, stack_BOI, strict=True):
        module.weight = nn.Parameter(weight_OI, requires_grad=False)
    return stack_BOI


def _kind(layer: nn.Module, family: Family, name: str, module: nn.Linear, block: str) -> Kind:
    """What a linear map outside the experts is: one output inside a MoE block is a gate (Qwen's shared experts)."""
    if within(name, block):
        factor = isinstance(layer.get_submodule(name.rpartition(".")[0]), FactoredLinear)
        return "router" if module.out_features == 1 and not factor else "shared"
    first = name.partition(".")[0]
    if first in family.beside:
        return "shared"
    dense = first in family.dense or "MLP" in type(layer.get_submodule(first)).__name__
    return "dense" if dense else "attention"


def require_masks(module: nn.Module, where: str) -> None:
    """Raise ValueError for a residue whose mask names more or fewer places in a row than there are values."""
    for name, each in module.named_modules():
        if isinstance(each, SparseMatrix) and not each.mask.is_meta:
            kept_O = parts_of_bytes(each.mask, 1)[:, : each.in_features].sum(1)
            if each.mask.dtype != torch.uint8 or bool((kept_O != each.values.shape[1]).any()):
                raise ValueError(
                    f"{where}: the mask of {name} does not name {each.values.shape[1]} places in every row."
                )


def stored_matrices(model: PreTrainedModel, index: int) -> dict[str, tuple[str, int]]:
    """Checkpoint tensors of a layer that hold one matrix each -> (the matrix's name, its number in the stack).

    Families that store their experts fused have none for them, and routers, which stay plain, have none; a skeleton is
    enough.
    """
    layer, family = hf.decoder_layers(model)[index], family_of(model.config)
    prefix = f"{hf.layers_prefix(model)}{index}."
    tags: dict[str, Tensor] = {}
    places: list[tuple[str, int]] = []
    view = moe_view(layer, family)
    router = view.names["router"] if view is not None else ""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name != router:
            tags[f"{prefix}{name}.weight"] = torch.tensor([[float(len(places))]])
            places.append((name, 0))
    if view is not None and not view.unfused:
        first = len(places)
        tags |= {f"{prefix}{view.names['experts']}.{name}": tag for name, tag in _tags(view, first).items()}
        places += [(f"{view.names['experts']}.{part}", e) for part in view.stacks() for e in range(view.num_experts)]
    return {name: places[number] for number, name in hf.stored_names(model, tags).items()}


def _tags(view: MoEView, first: int) -> dict[str, Tensor]:
    """The fused tensors with one number in place of each matrix, counted from `first`, part by part."""
    parts, experts = list(view.stacks()), view.num_experts
    number_PE = torch.arange(first, first + len(parts) * experts, dtype=torch.float32).view(len(parts), experts)
    column = {part: number_PE[n].view(-1, 1, 1) for n, part in enumerate(parts)}
    if "gate" not in column:
        return {"up_proj": column["up"], "down_proj": column["down"]}
    return {"gate_up_proj": torch.cat([column["gate"], column["up"]], 1), "down_proj": column["down"]}


def kinds_of(where: str, spare: str) -> list[Kind]:
    """The kinds of `where=` without those of `spare=`, each a comma-separated list; `all` is all but the routers.

    Raises ValueError for a kind that there is not, or if none is left.
    """
    everything = [kind for kind in KINDS if kind != "router"]
    wanted = {kind for word in _words("where", where) for kind in (everything if word == ALL else [word])}
    idle = [kind for kind in _words("spare", spare) if kind not in wanted]
    if idle:
        raise ValueError(f"spare={spare}: where={where} does not hold {idle[0]} anyway.")
    left = [kind for kind in KINDS if kind in wanted and kind not in _words("spare", spare)]
    if not left:
        raise ValueError(f"where={where} spare={spare}: nothing is left to be changed.")
    return left


def _words(key: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    allowed = [*KINDS, ALL] if key == "where" else list(KINDS)
    for word in words:
        if word not in allowed:
            raise ValueError(f"{key}={text}: {word!r} is no part of a layer; parts: {', '.join(allowed)}.")
    return words
