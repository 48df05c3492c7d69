"""In which numbers a model that learns is run: what stands in the place of its parameters while a layer runs.

In bf16, matrices are multiplied by torch.autocast; routers and norms stay in fp32, and so do all parameters that are
trained, of which forwards see rounded copies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.compression.recovery.adapters import Adapter, Trained
from moe_compress.models.component_map import NORMS, ROUTERS, SCANS, component_of_modules
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.modeling.unfused_experts import gate_on_input
from moe_compress.models.moe import all_moe_views


class Arithmetic:
    """Runs layers in `dtype` (fp32: as they are), each adapted parameter with its adapter."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype = torch.float32, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self.adapters = {id(each.held): each for each in (adapters or {}).values()}
        self.stacks: set[int] = set()

    @property
    def mixed(self) -> bool:
        """Whether forwards are in fewer bits than what is trained."""
        return self.dtype != torch.float32

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Products are in `dtype` inside the block."""
        return torch.autocast(self.device.type, self.dtype) if self.mixed else contextlib.nullcontext()

    @contextlib.contextmanager
    def layer(self, layer: nn.Module) -> Iterator[None]:
        """The same, with what stands in the place of the layer's parameters."""
        held = [
            (module, leaf, parameter)
            for module in (layer.modules() if self.adapters or self.stacks else ())
            for leaf, parameter in module._parameters.items()
            if parameter is not None and (id(parameter) in self.adapters or id(parameter) in self.stacks)
        ]
        try:
            for module, leaf, parameter in held:
                # As torch.func.functional_call does: whoever asks the module is given the tensor.
                module._parameters[leaf] = self._stand_in(parameter)  # type: ignore[assignment]
            with self.running():
                yield
        finally:
            for module, leaf, parameter in held:
                module._parameters[leaf] = parameter

    def _stand_in(self, parameter: nn.Parameter) -> Tensor:
        """What a forward sees of a parameter."""
        adapter = self.adapters.get(id(parameter))
        weight = parameter if adapter is None else adapter.weight()
        return weight.to(self.dtype)


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a run of this dtype multiplies while it trains: in fp16, gradients would vanish."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def load_dtype(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """In which a model is loaded that is trained in a run of this dtype: what it is stored in must not be rounded."""
    return torch.bfloat16 if stored == training_dtype(dtype) == torch.bfloat16 else torch.float32


@torch.no_grad()
def arithmetic_of(model: PreTrainedModel, trained: Trained, device: torch.device, dtype: torch.dtype) -> Arithmetic:
    """Make a model ready, in place, for a run of this dtype: of bf16, matrices that are not trained are held so."""
    found = Arithmetic(device, training_dtype(dtype), trained.adapters)
    if not found.mixed:
        return found
    moved = {id(each) for each in trained.whole.values()}
    adapted = {id(each.held) for each in trained.adapters.values()}
    places = component_of_modules(model)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None or not parameter.is_floating_point() or isinstance(module, PackedMatrix):
                continue
            exact = id(parameter) in moved or parameter.dim() < 2 or places[name] in (ROUTERS, NORMS, SCANS)
            if exact:
                parameter.data = parameter.data.float()
            elif id(parameter) not in adapted:
                parameter.data = parameter.data.to(found.dtype)
            if parameter.dim() == 3 and hasattr(module, "num_experts"):
                found.stacks.add(id(parameter))
    _keep_routers_exact(model, places, device)
    return found


def _keep_routers_exact(model: PreTrainedModel, places: Mapping[str, str], device: torch.device) -> None:
    """Let routers, and gates of shared experts, run in fp32 whatever surrounds them."""
    views = all_moe_views(model).values()
    routers = {id(view.router): view.router for view in views}
    gates = {id(m): m for name, m in model.named_modules() if isinstance(m, nn.Linear) and places[name] == ROUTERS}
    for module in (routers | gates).values():
        module.__dict__["forward"] = functools.partial(_in_float32, module.forward, device.type)
    for view in views:
        if gate_on_input(view.experts):  # adds what experts return to zeros of the dtype that it was given
            view.block.register_forward_pre_hook(lambda _module, args: tuple(map(_narrow, args)))


def _narrow(each: Any) -> Any:
    return each.to(torch.bfloat16) if isinstance(each, Tensor) and each.is_floating_point() else each


def _in_float32(forward: Callable[..., Any], device: str, *args: Any, **keywords: Any) -> Any:
    """A forward without autocast, given fp32."""
    wide = [each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in args]
    with torch.autocast(device, enabled=False):
        return forward(*wide, **keywords)
