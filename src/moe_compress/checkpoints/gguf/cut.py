"""What a plan leaves of a GGUF model: which layers, which experts, how many per token. No bytes are moved here.

One number of experts and of active experts is said for all layers; other edits need numbers that no file holds.
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
    layers = model.number("block_count") - model.number("nextn_predict_layers", 0)
    if not 0 < layers <= len(model.tensors):
        raise ValueError(f"{model.path} claims {layers} layers, and has {len(model.tensors)} tensors.")
    return layers


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
    with_experts = expert_layers(model)
    layers, experts, top_k = decoder_layers(model), model.number("expert_count"), model.number("expert_used_count")
    left = _Left(
        list(range(layers)), {n: tuple(range(experts)) for n in with_experts}, dict.fromkeys(with_experts, top_k)
    )
    for edit in edits:
        left.carry_out(edit, f"{plan}: its edit {edit.edit} of layer {edit.layer}", model.path.name)
    kept = {layer: left.experts[layer] for layer in left.order if layer in left.experts}
    if not kept:
        raise ValueError(f"{plan}: no layer with experts is left.")
    count = _the_same({layer: len(ids) for layer, ids in kept.items()}, plan, "experts")
    cut = Cut(tuple(left.order), kept, count, _the_same({n: left.top_k[n] for n in kept}, plan, "active experts"))
    if (len(cut.layers), cut.count, cut.top_k) == (layers, experts, top_k):
        raise ValueError(f"{plan} changes nothing of {model.path}.")
    _require_routable(model, cut, plan)
    if len(cut.layers) < layers:
        require_known_kinds(model, cut.layers)
    return cut


@dataclass(frozen=True, slots=True)
class _Left:
    """What is left while edits are carried out: layers in order, and experts and active ones of those with experts."""

    order: list[int]
    experts: dict[int, tuple[int, ...]]
    top_k: dict[int, int]

    def carry_out(self, edit: Edit, where: str, file: str) -> None:
        """One edit, whose layer and experts are numbered as they are by now."""
        if not 0 <= edit.layer < len(self.order):
            raise ValueError(f"{where}: there are layers 0 to {len(self.order) - 1} then.")
        layer = self.order[edit.layer]
        if isinstance(edit, DropLayer):
            self.order.remove(layer)
            return
        if not isinstance(edit, KeepExperts | SetTopK) or (isinstance(edit, KeepExperts) and edit.novices):
            raise ValueError(
                f"{where} needs numbers that {file} does not hold: only dropped experts, dropped layers and a top-k "
                "can be carried over; apply the plan to the model itself, and convert that."
            )
        if layer not in self.experts:
            raise ValueError(f"{where}: that layer has no experts.")
        if isinstance(edit, SetTopK):
            self.top_k[layer] = edit.top_k
            return
        before = self.experts[layer]
        if not edit.experts or sorted(set(edit.experts) & set(range(len(before)))) != list(edit.experts):
            raise ValueError(
                f"{where}: kept experts must be ascending ids below {len(before)}, not {list(edit.experts)}."
            )
        self.experts[layer] = tuple(before[expert] for expert in edit.experts)


def _the_same(numbers: dict[int, int], plan: Path, what: str) -> int:
    if len(set(numbers.values())) > 1:
        least, most = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
        raise ValueError(
            f"{plan} leaves {numbers[least]} {what} in layer {least} and {numbers[most]} in layer {most}, and one "
            "number is said for all of them: make a plan that is the same in every layer (budget=layer)."
        )
    return next(iter(numbers.values()))


def _require_routable(model: GgufModel, cut: Cut, plan: Path) -> None:
    """Raise ValueError unless a token finds its experts."""
    groups, experts = model.number("expert_group_count", 0), model.number("expert_count")
    if groups > 1 and experts % groups:
        raise ValueError(f"{model.path} claims {groups} equal groups of {experts} experts.")
    reachable = cut.count
    if groups > 1:
        used, each = model.number("expert_group_used_count", groups), experts // groups
        for layer, kept in cut.experts.items():
            sizes = {sum(expert // each == group for expert in kept) for group in range(groups)}
            if len(sizes) > 1 or min(sizes) < MIN_PER_GROUP:
                raise ValueError(
                    f"{plan}: {model.architecture} routes within {groups} groups, and every one has to keep as many "
                    f"experts of layer {layer}, {MIN_PER_GROUP} or more."
                )
        reachable = used * (cut.count // groups)
    if not 1 <= cut.top_k <= reachable:
        raise ValueError(f"{plan}: tokens would use {cut.top_k} experts a layer, of {reachable} that they can reach.")
