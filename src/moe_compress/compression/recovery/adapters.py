"""Low-rank adapters of a model's matrices while it trains, and the weights that they leave.

Ours, for whatever storage: stacks of experts (one adapter each), experts held one by one or in factors, linear maps.
peft wraps the module that holds a stack into another, in which experts are no longer found, tapped or told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.recovery.trained_codes import CODES, SCALES
from moe_compress.compression.recovery.trained_weights import LORA_A, LORA_B, require_plain, trained_parameters
from moe_compress.methods.recovery.low_rank import adapter_shapes, first_factors, low_rank_update
from moe_compress.methods.recovery_method import Distillation, LayerDistillation, LowRank


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is added to one parameter, which is held: scale * B A, and nothing where it was pruned."""

    held: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    alive: Tensor | None

    @classmethod
    def on(cls, held: nn.Parameter, how: LowRank, generator: torch.Generator) -> Adapter:
        """A new one, of which nothing comes yet."""
        a, b = (nn.Parameter(each.to(held.device)) for each in first_factors(held.shape, how.rank, generator))
        alive = held.detach() != 0
        return cls(held, a, b, how.alpha / how.rank, None if bool(alive.all()) else alive)

    def weight(self) -> Tensor:
        """The parameter with what is added to it, in fp32."""
        return self.held + low_rank_update(self.a, self.b, self.scale, self.alive)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The same for good; to the bit what it was, where nothing was learned."""
        return self.weight() if bool(self.b.any()) else self.held.detach()


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training moves: parameters whole, and adapters by the names of the parameters that these are on."""

    whole: Mapping[str, nn.Parameter]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that the optimiser steps."""
        added = {f"{name}.{LORA_A}": each.a for name, each in self.adapters.items()}
        return {**self.whole, **added, **{f"{name}.{LORA_B}": each.b for name, each in self.adapters.items()}}

    @property
    def names(self) -> list[str]:
        """Of the model's own parameters that change."""
        return [*self.whole, *self.adapters]

    def weights(self) -> dict[str, Tensor]:
        """What stands for the model's own parameters by now, of those that changed."""
        return {**self.whole, **{name: each.merged() for name, each in self.adapters.items()}}


def trained_of(model: PreTrainedModel, task: Distillation | LayerDistillation, seed: int) -> Trained:
    """What a task trains of a model in memory; packed matrices are released for it, in place.

    Raises ValueError if there is nothing of it, or it is packed.
    """
    whole = trained_parameters(model, task.trains) if task.trains else {}
    if task.adapters is None:
        return Trained(whole)
    return Trained(whole, adapters_on(adapted_parameters(model, task.adapters.parts), task.adapters, seed))


def adapters_on(named: Mapping[str, nn.Parameter], how: LowRank, seed: int) -> dict[str, Adapter]:
    """New adapters, drawn in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: Adapter.on(each, how, generator) for name, each in named.items()}


def adapted_parameters(model: PreTrainedModel, parts: frozenset[str]) -> dict[str, nn.Parameter]:
    """The matrices, and stacks of them, in these parts, by their full names. ValueError if there is none."""
    found = {name: each for name, each in trained_parameters(model, parts).items() if _is_matrix(model, name, each)}
    if not found:
        raise ValueError(f"train=lora: {', '.join(sorted(parts))} of this model hold no matrix that could be adapted.")
    return found


def _is_matrix(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> bool:
    """Whether it is the matrix of a linear map, or a stack of experts' matrices: no bias, no convolution."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    linear = leaf == "weight" and hasattr(holder, "in_features")
    return parameter.dim() == 2 if linear else parameter.dim() == 3 and hasattr(holder, "num_experts")


def require_trained_plain(source: Checkpoint, task: Distillation, trained: Trained) -> None:
    """Raise ValueError if one of the parameters is stored packed, unless it is trained as such."""
    if not task.trains & {CODES, SCALES}:
        require_plain(source, trained.names)


# --- counting -----------------------------------------------------------------------------------------------


def adapted_numbers(model: PreTrainedModel, how: LowRank | None) -> tuple[int, int]:
    """Of a skeleton: how many numbers adapters would hold, and the matrices that they are on."""
    if how is None:
        return 0, 0
    shapes = [each.shape for each in adapted_parameters(model, how.parts).values()]
    added = sum(math.prod(factor) for shape in shapes for factor in adapter_shapes(shape, how.rank))
    return added, sum(map(math.prod, shapes))


def require_smaller(model: PreTrainedModel, how: LowRank) -> None:
    """Raise ValueError for adapters that hold as many numbers as what they are on."""
    added, held = adapted_numbers(model, how)
    if added >= held:
        parts = ",".join(sorted(how.parts))
        raise ValueError(
            f"rank={how.rank}: adapters would hold {added:,} numbers, the matrices that they are on {held:,}: use a "
            f"lower rank=, or train these whole (train={parts})."
        )
