"""Which weights of a model a recovery trains, how they are stepped, and how they come into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.recovery.shared_out import by_kind, clip_gradients, everywhere, shared_as, whole
from moe_compress.compression.recovery.trained_codes import CODES, LATENT, SCALES, release
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.models import hf
from moe_compress.models.component_map import (
    EXPERTS,
    MLPS,
    NORMS,
    PROJECTIONS,
    RECURRENT,
    ROUTERS,
    SCANS,
    SHARED,
    component_of_modules,
)
from moe_compress.models.modeling.factored_experts import FactoredLinear, is_factored
from moe_compress.models.modeling.packed_linear import PackedMatrix

PARTS = {
    "routers": (ROUTERS,), "experts": (EXPERTS,), "shared": (SHARED,), "attention": (PROJECTIONS, RECURRENT, SCANS),
    "dense": (MLPS,), "norms": (NORMS,),
}  # fmt: skip
NEW = "new"
NOVICES = "novices"
BETAS = (0.9, 0.95)
BEST = "best"
# The factors of an adapter; the second begins at zero.
LORA_A, LORA_B = "lora_A", "lora_B"


def trained_parameters(model: PreTrainedModel, parts: frozenset[str]) -> dict[str, nn.Parameter]:
    """The parameters that train=`parts` means, by their full names; packed matrices are released for it, in place.

    Raises ValueError if there is none, or one is packed: codes are no numbers that could be moved.
    """
    coded = parts & {CODES, SCALES}
    if coded:
        others = trained_parameters(model, parts - coded) if parts - coded else {}
        return {**others, **release(model, coded)}
    place, inside = component_of_modules(model), hf.layers_prefix(model)
    read = hf.text_prefixes(model)
    components = {each for part in parts for each in PARTS.get(part, ())}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if not name.startswith(read):
            continue
        meant = "all" in parts or (name.startswith(inside) and place.get(module) in components)
        if meant or (NEW in parts and _is_new(model, module, leaf)):
            found[name] = parameter
    packed = next((name for name in found if _is_packed(model.get_submodule(name.rpartition(".")[0]))), None)
    if packed is not None:
        raise ValueError(f"train={','.join(sorted(parts))}: {packed} is packed, and codes cannot be trained.")
    if not found:
        raise ValueError(f"train={','.join(sorted(parts))}: {model.config.model_type} as it is here has none of these.")
    return found


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedMatrix)


def _is_new(model: PreTrainedModel, module: str, leaf: str) -> bool:
    """Whether a stage before made it: factors, or constants in place of experts."""
    if leaf == NOVICES:
        return True
    steps = module.split(".")
    inside = (model.get_submodule(".".join(steps[:n])) for n in range(1, len(steps) + 1))
    return any(is_factored(each) or isinstance(each, FactoredLinear) for each in inside)


def require_plain(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise ValueError if one of these parameters is stored packed in a plain checkpoint, whose numbers are read."""
    packed = {key for key, entry in checkpoint.tensors.items() if isinstance(entry, StoredWeight)}
    stored = stored_tensors(checkpoint.skeleton(torch.float32), {name: None for name in names})
    found = sorted(stored.keys() & packed)
    if found:
        raise ValueError(f"{found[0]} is packed, and codes cannot be trained: train what is plain, such as routers.")


@dataclass
class Optimiser:
    """AdamW over some parameters with a cosine schedule; entries of matrices that are zero were pruned, and stay zero.

    Everything that it has to remember is tensors, by name: see `state` and `restore`.
    """

    parameters: Mapping[str, nn.Parameter]
    options: TrainingOptions
    masks: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        options = self.options
        groups = [{"params": kind} for kind in by_kind(self.parameters.values())]
        self.adam = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, weight_decay=options.decay)
        for name, parameter in self.parameters.items():
            alive = parameter.detach() != 0
            leaf = name.rpartition(".")[2]
            # Codes are often zero, which of those were pruned their matrix knows.
            zeros_mean_nothing = "bias" in leaf or leaf in (LATENT, LORA_A, LORA_B)
            if parameter.dim() > 1 and not zeros_mean_nothing and not bool(everywhere(alive.all())):
                self.masks[name] = alive

    def step(self, number: int) -> None:
        """One step, the `number`th of all, with the gradients that are there; these are gone then."""
        for group in self.adam.param_groups:
            group["lr"] = self.options.lr * schedule(number, self.options)
        for name, alive in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                # Without a gradient a zero has no moments either, and AdamW leaves it where it is.
                gradient.mul_(alive)
        if self.options.clip:
            clip_gradients(self.parameters.values(), self.options.clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    @property
    def felt(self) -> float:
        """How much the loss could change by doubling everything, as the gradients that are there have it at most.

        What is zero as a whole counts as if its norm were 1: of adapters, nothing else is felt at first.
        """
        found = ((each, each.grad) for each in self.parameters.values() if each.grad is not None)
        norms = ([float(everywhere(tensor.detach().norm())) for tensor in pair] for pair in found)
        return sum((value or 1.0) * gradient for value, gradient in norms)

    def remember(self) -> None:
        """Keep the values as they are now, for `recall`."""
        self.best = {name: each.detach().clone() for name, each in self.parameters.items()}

    @torch.no_grad()
    def recall(self) -> None:
        """Go back to the values that were remembered last."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])

    def state(self) -> dict[str, Tensor]:
        """What it needs to go on: values, moments, and values that are remembered, of all processes together."""
        found = {f"{name}|{BEST}": whole(each) for name, each in self.best.items()}
        for name, parameter in self.parameters.items():
            found[f"{name}|value"] = whole(parameter.detach())
            for key, tensor in self.adam.state.get(parameter, {}).items():
                found[f"{name}|{key}"] = whole(tensor)
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(shared_as(state[f"{name}|value"], parameter))
            if f"{name}|{BEST}" in state:
                self.best[name] = shared_as(state[f"{name}|{BEST}"].to(parameter.device), parameter)
            keys = [key for key in state if key.startswith(f"{name}|") and not key.endswith(("|value", f"|{BEST}"))]
            if keys:
                device = parameter.device
                self.adam.state[parameter] = {
                    key.rpartition("|")[2]: state[key].to("cpu")
                    if key.endswith("|step")
                    else shared_as(state[key].to(device), parameter)
                    for key in keys
                }

    @property
    def bytes(self) -> int:
        """Of the moments, once there are any."""
        return 2 * sum(each.numel() * each.element_size() for each in self.parameters.values())


def schedule(step: int, options: TrainingOptions) -> float:
    """The share of the highest learning rate at a step: up in a line, down on a cosine."""
    warm = options.warmup * options.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(options.steps - warm, 1)))


def stored_tensors(model: PreTrainedModel, named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Parameters by their full names as tensors under the names that the checkpoint has for them.

    None stands for the model's own.
    """
    state = dict(model.named_parameters())
    values = {name: state[name].detach() if value is None else value for name, value in named.items()}
    return hf.checkpoint_tensors(model, values)
