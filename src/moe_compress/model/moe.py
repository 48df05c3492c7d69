"""A decoder layer and its MoE block with the storage hidden.

E experts, D model width, F inner width of an expert. Whatever the fused layout (transposed, interleaved,
without a gate), `MoEView.expert(e)` gives plain `[out, in]` matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.model.families import Family, family_of, groups_of
from moe_compress.model.hf import decoder_layers
from moe_compress.model.rerouting import REROUTE
from moe_compress.model.separate import CHILDREN, biases, expert_count, is_separate, model_width, stacks, widths

ROUTER_WORDS = ("Router", "Gate", "Gating")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """The numbers that decide what may be dropped from one layer's MoE block."""

    layer: int
    num_experts: int
    top_k: int
    active: float | None = None
    width: int = 0
    inner: int = 0
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


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert: gate and up [F, D], down [D, F]; gate is None where the family has none; biases or None."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MoEView:
    """The MoE block of one decoder layer."""

    block: nn.Module
    experts: Any
    router: nn.Module
    names: dict[str, str]

    @property
    def num_experts(self) -> int:
        """Routed experts that the block holds."""
        return expert_count(self.experts)

    @property
    def alias(self) -> list[int] | None:
        """Which expert (from num_experts on: which novice) each router row leads to; None: each to its own."""
        return self.experts.__dict__.get(REROUTE, {}).get("alias")

    @property
    def rows(self) -> int:
        """Rows of the router: as many as experts, unless experts were merged with router=sum or left novices."""
        return self.num_experts if self.alias is None else len(self.alias)

    @property
    def top_k(self) -> int | None:
        """Experts per token in this layer; None where neither router nor block says so."""
        for module in (self.router, self.block):
            if isinstance(module.__dict__.get("top_k"), int):
                return int(module.top_k)  # type: ignore[arg-type]
        return None

    @property
    def active(self) -> float | None:
        """Experts that a token uses on average: top_k, unless some are skipped or replaced by constants."""
        measured = self.experts.__dict__.get(REROUTE, {}).get("active")
        return self.top_k if measured is None else measured

    @property
    def router_rows_ED(self) -> Tensor:
        """The router's weight, one row an expert (several, or rows of novices, once experts were rerouted)."""
        return next(p for p in self.router.parameters() if p.dim() == 2 and p.shape[0] == self.rows)

    @property
    def widths(self) -> list[int]:
        """Inner neurons of every expert."""
        return widths(self.experts)

    @property
    def one_by_one(self) -> bool:
        """Whether the experts are held one by one, as those of different widths are, and packed ones."""
        return is_separate(self.experts)

    def stacks(self) -> dict[str, Tensor]:
        """The experts' matrices [E, out, in] by name (gate, where there is one, up, down): views onto the storage.

        Of experts that are held one by one: copies, filled up with zeros to the largest.
        """
        return stacks(self.experts)

    def expert(self, index: int) -> Expert:
        """Expert `index` as plain matrices, whatever the storage."""
        matrix = {name: stack_EOI[index] for name, stack_EOI in self.stacks().items()}
        bias = {name: stack_EO[index] for name, stack_EO in biases(self.experts).items()}
        return Expert(matrix.get("gate"), matrix["up"], matrix["down"], *(bias.get(part) for part in CHILDREN))


def moe_view(layer: nn.Module, family: Family) -> MoEView | None:
    """The MoE block of a decoder layer; None if the layer has none (or none that experts can be cut from)."""
    for name, module in layer.named_modules():
        down = module._parameters.get("down_proj")
        fused = is_separate(module) or (down is not None and down.dim() == 3)
        if not fused or name.count(".") < 1:
            continue
        block_name = name.rpartition(".")[0]
        block = layer.get_submodule(block_name)
        router_name = family.router or _router_child(block)
        names = {"block": block_name, "experts": name, "router": f"{block_name}.{router_name}"}
        return MoEView(block, module, block.get_submodule(router_name), names)
    return None


def _router_child(block: nn.Module) -> str:
    named = [
        name
        for name, child in block.named_children()
        if any(word in type(child).__name__ for word in ROUTER_WORDS) and not name.startswith("shared")
    ]
    if len(named) != 1:
        raise ValueError(
            f"{type(block).__name__} has {len(named)} children that look like a router: name it in a Family entry."
        )
    return named[0]


def moe_views(model: PreTrainedModel) -> dict[int, MoEView]:
    """The MoE blocks of a model by layer index."""
    family = family_of(model.config)
    views = {index: moe_view(layer, family) for index, layer in enumerate(decoder_layers(model))}
    return {index: view for index, view in views.items() if view is not None}


def moe_shapes(model: PreTrainedModel) -> list[MoEShape]:
    """The MoE blocks of a model as numbers; a skeleton is enough."""
    return [moe_shape(model, index, view) for index, view in moe_views(model).items()]


def moe_shape(model: PreTrainedModel, index: int, view: MoEView) -> MoEShape:
    """One MoE block as numbers."""
    config = model.config
    family = family_of(config)
    groups, groups_used = groups_of(config)
    return MoEShape(
        layer=index,
        num_experts=view.num_experts,
        top_k=view.top_k or getattr(config, family.top_k_key),
        active=view.active,
        width=model_width(view.experts),
        inner=inner_width(view),
        groups=groups,
        groups_used=groups_used,
        min_per_group=family.min_per_group,
        fixed_top_k=family.fixed_top_k,
        aliased=view.rows != view.num_experts,
        novices=view.alias is not None and max(view.alias) >= view.num_experts,
        rerouted=view.alias is not None or view.experts.__dict__.get(REROUTE, {}).get("threshold") is not None,
    )


def inner_width(view: MoEView) -> int:
    """Inner neurons of each expert, or of the widest."""
    return max(view.widths)


@torch.no_grad()
def permute_neurons(view: MoEView, order_EF: Tensor) -> None:
    """Reorder the neurons of every expert, in place; the experts compute what they did before.

    order_EF[e, i]: which neuron of expert e comes to place i.
    """
    fused = view.experts
    transposed = getattr(fused, "is_transposed", True)
    inner = order_EF.shape[1]
    both_EN = order_EF
    if getattr(fused, "has_gate", True):
        concatenated = getattr(fused, "is_concatenated", True)
        parts = (order_EF, order_EF + inner) if concatenated else (2 * order_EF, 2 * order_EF + 1)
        both_EN = torch.cat(parts, 1) if concatenated else torch.stack(parts, 2).flatten(1)
    for name, parameter in fused.named_parameters(recurse=False):
        into = not name.startswith("down")  # gate and up make neurons, down uses them
        if name == "down_proj_bias" or name == "novices":
            continue
        dim = 1 if parameter.dim() == 2 or into != transposed else 2
        index = (both_EN if into else order_EF).to(parameter.device)
        shape = [len(index), index.shape[1], 1] if dim == 1 else [len(index), 1, index.shape[1]]
        spread = index if parameter.dim() == 2 else index.reshape(shape).expand_as(parameter)
        parameter.copy_(torch.gather(parameter.detach(), dim, spread))


def weight_sums(view: MoEView) -> dict[str, Tensor]:
    """Sums over each expert's weights, float64 [E]: `abs`, `square`, `count`; and `router_norm`."""
    sums = {key: torch.zeros(view.num_experts, dtype=torch.float64) for key in ("abs", "square", "count")}
    for weight in view.stacks().values():
        sums["abs"] += _row_norms(weight, 1).sum(1)
        sums["square"] += _row_norms(weight, 2).square().sum(1)
        sums["count"] += weight.shape[1] * weight.shape[2] / inner_width(view) * torch.tensor(view.widths)
    row_R = torch.linalg.vector_norm(view.router_rows_ED.double(), 2, dim=1).cpu()
    if view.alias is not None:  # an expert with several rows is as long as the longest of them
        led = torch.tensor(view.alias)
        row_R = torch.zeros(max(view.num_experts, 1 + int(led.max())), dtype=torch.float64).scatter_reduce(
            0, led, row_R, "amax"
        )[: view.num_experts]
    sums["router_norm"] = row_R
    return sums


def _row_norms(weight_EOI: Tensor, order: int) -> Tensor:
    """Norm of every row, float64 [E, O]. One sum over a whole matrix, in its own dtype, would be percents off."""
    rows = [torch.linalg.vector_norm(weight_OI, order, dim=1, dtype=torch.float32) for weight_OI in weight_EOI]
    return torch.stack(rows).double().cpu()
