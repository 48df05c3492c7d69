"""Experts as one dense MLP: sum_e p_e D_e phi(G_e x, U_e x) with fixed p is an MLP with all their neurons side by side.

E experts, K of them, F neurons of one, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moe_compress.models.families import Family
from moe_compress.models.moe import MoEView

# What projections are called: gate, up and down; gate and up in one, and down.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
JOINED = ("input_linear", "output_linear")


@dataclass(frozen=True, slots=True)
class Neurons:
    """Some neurons of a gated MLP: gate and up [F, D], down [D, F]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def scaled(self, factor: float) -> Neurons:
        """The same with their outputs times a factor, which is applied in fp32."""
        down_DF = self.down if factor == 1.0 else (self.down.float() * factor).to(self.down.dtype)
        return Neurons(self.gate, self.up, down_DF)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.up.shape[0]


class DenseMLP(nn.Module):
    """A gated MLP without biases, as dense architectures have it."""

    def __init__(self, neurons: Neurons, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (neurons.gate, neurons.up, neurons.down))
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What dense architectures compute."""
        gated: Tensor = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)


def _linear(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight_OI.shape
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    return linear


def joined(parts: Sequence[Neurons], width: int) -> Neurons:
    """All of them side by side, filled up with zeros to `width`."""
    gate_FD = torch.cat([part.gate for part in parts])
    up_FD = torch.cat([part.up for part in parts])
    down_DF = torch.cat([part.down for part in parts], dim=1)
    more = width - len(up_FD)
    return Neurons(pad(gate_FD, (0, 0, 0, more)), pad(up_FD, (0, 0, 0, more)), pad(down_DF, (0, more)))


def of_experts(view: MoEView, experts: Sequence[int], gates: Sequence[float]) -> Neurons:
    """Those of some experts, the outputs of each times its gate. ValueError for experts without a gate projection."""
    stacks = view.stacks()
    if "gate" not in stacks:
        raise ValueError("its experts have no gate projection, and gated MLPs are all that is made here.")
    index = torch.tensor(list(experts), device=stacks["up"].device)
    gate_KFD, up_KFD, down_KDF = (stacks[name].detach().index_select(0, index) for name in ("gate", "up", "down"))
    gate_K = torch.tensor(list(gates), dtype=torch.float32, device=down_KDF.device)
    down_KDF = (down_KDF.float() * gate_K[:, None, None]).to(down_KDF.dtype)
    return Neurons(gate_KFD.flatten(0, 1), up_KFD.flatten(0, 1), down_KDF.transpose(0, 1).flatten(1))


def of_mlp(mlp: nn.Module) -> Neurons | None:
    """Those of a gated MLP of the model; None if it is none, or has biases."""
    linears = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    if any(child.bias is not None for child in linears.values()):
        return None
    if linears.keys() == set(PROJECTIONS):
        return Neurons(*(linears[name].weight.detach() for name in PROJECTIONS))
    if linears.keys() == set(JOINED):
        both_2FD, down_DF = (linears[name].weight.detach() for name in JOINED)
        gate_FD, up_FD = both_2FD.chunk(2)
        return Neurons(gate_FD, up_FD, down_DF)
    return None


def shared_experts(layer: nn.Module, view: MoEView, family: Family) -> dict[str, nn.Module]:
    """The MLPs that every token passes beside the routed experts, by name within the layer."""
    block = {name: child for name, child in view.block.named_children() if of_mlp(child) is not None}
    stem = view.names["block"]
    found = {f"{stem}.{name}".lstrip("."): child for name, child in block.items()} if not view.in_layer else {}
    beside = {name: child for name, child in layer.named_children() if name in family.beside}
    return found | {name: child for name, child in beside.items() if of_mlp(child) is not None}


def shared_gate(view: MoEView) -> Any | None:
    """The map onto one number whose sigmoid the output of the shared experts is multiplied by, where there is one."""
    return next((each for each in view.block.children() if getattr(each, "out_features", 0) == 1), None)


def dense_widths(layers: Iterable[nn.Module], family: Family) -> dict[int, int]:
    """By layer: neurons of its dense MLP, of those that have one."""
    found: dict[int, int] = {}
    for index, layer in enumerate(layers):
        mlp = dense_mlp(layer, family)
        neurons = of_mlp(mlp[1]) if mlp is not None else None
        found |= {index: neurons.count} if neurons is not None else {}
    return found


def dense_mlp(layer: nn.Module, family: Family) -> tuple[str, nn.Module] | None:
    """The dense MLP of a layer, with its name."""
    children = dict(layer.named_children())
    made = next(((name, child) for name, child in children.items() if isinstance(child, DenseMLP)), None)
    return made or next(((name, children[name]) for name in family.dense if name in children), None)
