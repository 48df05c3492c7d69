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

from moe_compress.models.families import Family, family_of
from moe_compress.models.hf import decoder_layers
from moe_compress.models.modeling.factored_experts import is_factored
from moe_compress.models.modeling.rerouting import REROUTE
from moe_compress.models.modeling.unfused_experts import CHILDREN, biases, expert_count, is_separate, stacks, widths

ROUTER_WORDS = ("Router", "Gate", "Gating")


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
    """The MoE block of one decoder layer; the layer itself where router and experts lie in it directly (Gemma-4).

    spare_rows: rows of the router behind those that lead to experts.
    """

    block: nn.Module
    experts: Any
    router: nn.Module
    names: dict[str, str]
    spare_rows: int = 0

    @property
    def num_experts(self) -> int:
        """Routed experts that the block holds."""
        return expert_count(self.experts)

    @property
    def row_to_expert(self) -> list[int] | None:
        """Which expert (from num_experts on: which novice) each router row leads to; None: each to its own."""
        return self.experts.__dict__.get(REROUTE, {}).get("alias")

    @property
    def router_rows(self) -> int:
        """Rows of the router: as many as experts, unless experts were merged with router=sum or left novices."""
        return self.num_experts if self.row_to_expert is None else len(self.row_to_expert)

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
        count, spare = self.router_rows, self.spare_rows
        rows = [p for p in self.router.parameters() if p.dim() == 2 and p.shape[0] == count + spare]
        if not rows:
            raise ValueError(f"{type(self.router).__name__} holds no matrix with a row for each expert.")
        return rows[0][:count] if spare else rows[0]

    @property
    def by_table(self) -> bool:
        """Whether a table of token ids says which experts a token uses, and the router only how much of each."""
        return any(buffer.dim() == 2 and not buffer.is_floating_point() for buffer in self.router.buffers())

    @property
    def widths(self) -> list[int]:
        """Inner neurons of every expert."""
        return widths(self.experts)

    @property
    def in_layer(self) -> bool:
        """Whether router and experts are no block of their own, which could be removed, or run alone."""
        return not self.names["block"]

    def run(self, hidden_TD: Tensor) -> None:
        """Run the block on tokens as they enter it, for those who listen."""
        if self.in_layer:
            _, gate_TK, index_TK = self.router(hidden_TD)
            self.experts(hidden_TD, index_TK, gate_TK)
        else:
            self.block(hidden_TD[None])

    @property
    def unfused(self) -> bool:
        """Whether the experts are held one by one, as those of different widths are, and packed ones."""
        return is_separate(self.experts)

    @property
    def factored(self) -> bool:
        """Whether any of the experts' matrices are held in factors."""
        return is_factored(self.experts)

    def stacks(self) -> dict[str, Tensor]:
        """The experts' matrices [E, out, in] by name (gate, where there is one, up, down): views onto the storage.

        Of experts that are held one by one: copies, filled up with zeros to the largest; of factors, their products.
        """
        return stacks(self.experts)

    def expert(self, index: int) -> Expert:
        """Expert `index` as plain matrices, whatever the storage."""
        matrix = self._factored_expert(index) if self.factored else {n: s[index] for n, s in self.stacks().items()}
        bias = {name: stack_EO[index] for name, stack_EO in biases(self.experts).items()}
        return Expert(matrix.get("gate"), matrix["up"], matrix["down"], *(bias.get(part) for part in CHILDREN))

    def _factored_expert(self, index: int) -> dict[str, Tensor]:
        """Its matrices alone: those of all others need not be multiplied out."""
        expert = self.experts.separate[index]
        return {part: expert[name].dense() for part, name in CHILDREN.items() if name in expert}


def moe_view(layer: nn.Module, family: Family) -> MoEView | None:
    """The MoE block of a decoder layer; None if the layer has none (or none that experts can be cut from)."""
    for name, module in layer.named_modules():
        down = module._parameters.get("down_proj")
        fused = is_separate(module) or (down is not None and down.dim() == 3)
        if not fused or ("." not in name and family.router not in dict(layer.named_children())):
            continue
        block_name = name.rpartition(".")[0]
        block = layer.get_submodule(block_name)
        router_name = family.router or _router_child(block)
        names = {"block": block_name, "experts": name, "router": f"{block_name}.{router_name}".lstrip(".")}
        router: Any = block.get_submodule(router_name)
        return MoEView(block, module, router, names, getattr(router, family.spare_rows) if family.spare_rows else 0)
    return None


def learned_view(layer: nn.Module, family: Family) -> MoEView | None:
    """The same where the router chooses the experts: others cannot be cut, or told apart by what they are sent."""
    view = moe_view(layer, family)
    return None if view is None or view.by_table else view


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
    """The MoE blocks of a model whose routers choose, by layer index."""
    return {index: view for index, view in all_moe_views(model).items() if not view.by_table}


def all_moe_views(model: PreTrainedModel) -> dict[int, MoEView]:
    """The same, with those whose experts are looked up."""
    family = family_of(model.config)
    views = {index: moe_view(layer, family) for index, layer in enumerate(decoder_layers(model))}
    return {index: view for index, view in views.items() if view is not None}


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


def router_logits(output: Any, rows: int, family: Family) -> Tensor:
    """What a router of `rows` rows gave each token before it scored and selected, [T, rows]."""
    parts = [output] if isinstance(output, Tensor) else output
    found = [part for part in parts if part.is_floating_point() and part.shape[-1] == rows]
    given_TR = found[family.logits_at].reshape(-1, rows)
    # Logits that softmax makes these probabilities of.
    return given_TR.clamp_min(torch.finfo(given_TR.dtype).tiny).log() if family.gives_probabilities else given_TR


def by_expert(scores_TR: Tensor, view: MoEView) -> Tensor:
    """Scores of router rows, [T, rows], as those of experts, [T, E]: several may lead to one, some to constants."""
    if view.row_to_expert is None:
        return scores_TR
    led = torch.tensor(view.row_to_expert, device=scores_TR.device)
    ends = max(view.num_experts, 1 + int(led.max()))
    return scores_TR.new_zeros(len(scores_TR), ends).index_add_(1, led, scores_TR)[:, : view.num_experts]
