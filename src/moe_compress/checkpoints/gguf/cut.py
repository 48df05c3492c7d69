"""What a plan leaves of a GGUF model: which layers, which experts, how many per token. No bytes are moved here.

GGUF says one number of experts and of active experts for all layers; other edits need numbers that no file holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compress.checkpoints.gguf.architectures import require_known_kinds
from moe_compress.checkpoints.gguf.reader import GgufModel
from moe_compress.edits.edits import DropLayer, Edit, KeepExperts, SetTopK

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors whose slowest axis is the experts', and those that belong to experts but have no such axis.
BY_EXPERT = re.compile(r"(ffn_(gate|up|down|gate_up)_exps\.\w+|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)")
SHARED = re.compile(r"ffn_norm_exps\..+|ffn_gate_inp_shexp\..+|ffn_(gate|up|down)_shexp\..+|ffn_gate_inp\.scale")
SUSPECT = re.compile(r"exp|gate_inp|tid2eid|ffn_(gate|up|down)\.\d+\.")
# Groups are judged by their best two experts.
MIN_PER_GROUP = 2


@dataclass(frozen=True, slots=True)
class Cut:
    """layers: those that stay, by their numbers in the file; experts: those that stay of a layer, by the same numbers.

    count: experts that every layer keeps; top_k: experts a token uses.
    """

    layers: tuple[int, ...]
    experts: dict[int, tuple[int, ...]]
    count: int
    top_k: int


def split_name(name: str) -> tuple[int | None, str]:
    """The layer of a tensor, and the rest of its name."""
    found = LAYER.fullmatch(name)
    return (None, name) if found is None else (int(found[1]), found[2])


def decoder_layers(model: GgufModel) -> int:
    """Layers without those behind them that predict further tokens."""
    return model.number("block_count") - model.number("nextn_predict_layers", 0)


def expert_layers(model: GgufModel) -> list[int]:
    """Decoder layers with experts. ValueError unless each has as many as the metadata says."""
    count, last = model.number("expert_count", 0), decoder_layers(model)
    found = []
    for name, tensor in model.tensors.items():
        layer, rest = split_name(name)
        if layer is None or not BY_EXPERT.fullmatch(rest):
            _require_plain_name(model.path, name, rest)
        elif not tensor.shape or tensor.shape[0] != count:
            raise ValueError(f"{model.path}: {name} is {list(tensor.shape)}, where the metadata has {count} experts.")
        elif rest == "ffn_down_exps.weight" and layer < last:
            found.append(layer)
    if not found:
        raise ValueError(f"{model.path} has no experts: its tensors have no ffn_down_exps.")
    return sorted(found)


def _require_plain_name(path: Path, name: str, rest: str) -> None:
    if name.startswith("blk.") and SUSPECT.search(rest) and not SHARED.fullmatch(rest):
        each = re.match(r"ffn_(gate|up|down)\.\d+\.", rest)
        why = "holds one expert alone, as files of before April 2024 do" if each else "belongs to experts"
        raise ValueError(f"{path}: {name} {why}, and cannot be cut here: convert the model with today's llama.cpp.")


def cut_of(model: GgufModel, edits: Sequence[Edit], plan: Path) -> Cut:
    """What the edits leave. ValueError says which of them a GGUF file cannot express."""
    layers, experts = decoder_layers(model), model.number("expert_count")
    order = list(range(layers))
    kept = {layer: tuple(range(experts)) for layer in expert_layers(model)}
    active = dict.fromkeys(kept, model.number("expert_used_count"))
    for edit in edits:
        _carry_out(edit, order, kept, active, plan, model)
    left = [layer for layer in order if layer in kept]
    if not left:
        raise ValueError(f"{plan}: no layer with experts is left.")
    count = _the_same({layer: len(kept[layer]) for layer in left}, plan, "experts")
    top_k = _the_same({layer: active[layer] for layer in left}, plan, "active experts")
    if (len(order), count, top_k) == (layers, experts, model.number("expert_used_count")):
        raise ValueError(f"{plan} changes nothing of {model.path}.")
    cut = Cut(tuple(order), {layer: kept[layer] for layer in left}, count, top_k)
    _require_routable(model, cut, plan)
    if len(order) < layers:
        require_known_kinds(model, order)
    return cut


def _carry_out(
    edit: Edit,
    order: list[int],
    kept: dict[int, tuple[int, ...]],
    active: dict[int, int],
    plan: Path,
    model: GgufModel,
) -> None:
    """One edit, in place. order: the layers that are left so far."""
    where = f"{plan}: its edit {edit.edit} of layer {edit.layer}"
    if not 0 <= edit.layer < len(order):
        raise ValueError(f"{where}: there are layers 0 to {len(order) - 1} then.")
    source = order[edit.layer]
    if isinstance(edit, DropLayer):
        order.remove(source)
        return
    if not isinstance(edit, KeepExperts | SetTopK) or (isinstance(edit, KeepExperts) and edit.novices):
        raise ValueError(
            f"{where} needs numbers that {model.path.name} does not hold: only dropped experts, dropped layers and a "
            "top-k can be carried over; apply the plan to the model itself, and convert that."
        )
    if source not in kept:
        raise ValueError(f"{where}: that layer has no experts.")
    if isinstance(edit, SetTopK):
        active[source] = edit.top_k
        return
    before = kept[source]
    if not edit.experts or sorted(set(edit.experts) & set(range(len(before)))) != list(edit.experts):
        raise ValueError(f"{where}: kept experts must be ascending ids below {len(before)}, not {list(edit.experts)}.")
    kept[source] = tuple(before[expert] for expert in edit.experts)


def _the_same(numbers: dict[int, int], plan: Path, what: str) -> int:
    if len(set(numbers.values())) > 1:
        least, most = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
        raise ValueError(
            f"{plan} leaves {numbers[least]} {what} in layer {least} and {numbers[most]} in layer {most}, and GGUF "
            "says one number for all layers: make a plan that keeps as many in every layer (budget=layer)."
        )
    return next(iter(numbers.values()))


def _require_routable(model: GgufModel, cut: Cut, plan: Path) -> None:
    """Raise ValueError unless a token finds its experts."""
    groups = model.number("expert_group_count", 0)
    reachable = cut.count
    if groups > 1:
        used, each = model.number("expert_group_used_count", groups), model.number("expert_count") // groups
        for layer, experts in cut.experts.items():
            sizes = {sum(expert // each == group for expert in experts) for group in range(groups)}
            if len(sizes) > 1 or min(sizes) < MIN_PER_GROUP:
                raise ValueError(
                    f"{plan}: {model.architecture} routes within {groups} groups, and every one has to keep as many "
                    f"experts of layer {layer}, {MIN_PER_GROUP} or more."
                )
        reachable = used * (cut.count // groups)
    if not 1 <= cut.top_k <= reachable:
        raise ValueError(f"{plan}: tokens would use {cut.top_k} experts a layer, of {reachable} that they can reach.")
