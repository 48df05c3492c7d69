"""What factors save, in the words of `compression_statistics.yaml`: stored, used by a token and multiplied with it.

All of it counts weights of routed experts, in layers that hold some of them in factors, and of linear maps of shared
ones that are held so. A skeleton is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from moe_compress.edits.factors import Part
from moe_compress.models.factor_counting import multiplied_times
from moe_compress.models.families import experts_per_token
from moe_compress.models.hf import decoder_layers
from moe_compress.models.modeling.factored_experts import FactoredLinear
from moe_compress.models.modeling.packed_linear import PARAMETERS as PACKED
from moe_compress.models.modeling.unfused_experts import CHILDREN
from moe_compress.models.moe import MoEView, moe_views

GB = 1e9
BIAS = "bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorCounts:
    """Weights of experts: stored in all, used by one token, multiplied with it, and bytes; before and in factors.

    per_expert: multiplied with a token if what experts share were multiplied once for every expert that the token uses;
    once: as it is.
    """

    total_before: float
    total: float
    active_before: float
    active: float
    per_expert: float
    once: float
    bytes_before: float
    bytes: float

    def to_json(self) -> dict[str, int | float]:
        """Under the names of the file; ratios are shares of the original."""
        return {
            "total_params_original": round(self.total_before),
            "total_params_compressed": round(self.total),
            "total_compression_ratio": round(self.total / self.total_before, 5),
            "total_reduction_percent": round(100 * (1 - self.total / self.total_before), 3),
            "active_params_original": round(self.active_before),
            "active_params_compressed": round(self.active),
            "active_compression_ratio": round(self.active / self.active_before, 5),
            "active_change_percent": round(100 * (self.active / self.active_before - 1), 3),
            "executed_ratio_shared_per_expert": round(self.per_expert / self.active_before, 5),
            "executed_ratio_shared_once": round(self.once / self.active_before, 5),
            "total_memory_original_gb": round(self.bytes_before / GB, 9),
            "total_memory_compressed_gb": round(self.bytes / GB, 9),
            "memory_saved_gb": round((self.bytes_before - self.bytes) / GB, 9),
        }


def factor_statistics(model: PreTrainedModel, itemsize: int) -> dict[str, Any]:
    """The file's values: of all layers with factors together, and of each of their layers and projections.

    itemsize: bytes of a number that is not packed.
    """
    layers: dict[int, dict[str, FactorCounts]] = {}
    for index, view in moe_views(model).items():
        found: dict[str, FactorCounts] = {}
        if view.factored:
            top_k = experts_per_token(model.config)
            found = {
                part: _counts(view, part, top_k if view.active is None else view.active, itemsize)
                for part in get_args(Part)
                if CHILDREN[part] in view.experts.separate[0]
            }
        for name, module in decoder_layers(model)[index].named_modules():
            if isinstance(module, FactoredLinear):
                found[name] = _linear_counts(module, itemsize)
        if found:
            layers[index] = found
    every = [counts for parts in layers.values() for counts in parts.values()]
    by_layer = {
        index: {**_sum(parts.values()).to_json(), "projections": {part: each.to_json() for part, each in parts.items()}}
        for index, parts in layers.items()
    }
    return {**_sum(every).to_json(), "layers": by_layer}


def _sum(counts: Iterable[FactorCounts]) -> FactorCounts:
    every = list(counts)
    return FactorCounts(**{n: sum(getattr(each, n) for each in every) for n in FactorCounts.__dataclass_fields__})


def _counts(view: MoEView, part: Part, active: float, itemsize: int) -> FactorCounts:
    """Of one projection of one layer; a token uses `active` experts."""
    name, experts = CHILDREN[part], view.num_experts
    matrices = [expert[name] for expert in view.experts.separate]
    shared = view.experts.shared_parts[name] if name in view.experts.shared_parts else nn.ModuleDict()
    times = multiplied_times(view, active, round(active), 1)
    dense = sum(each.out_features * each.in_features for each in matrices)
    own, own_run = _numbers(matrices, {}), _numbers(matrices, times)
    common, common_run = _numbers([shared], {}), _numbers([shared], times)
    return FactorCounts(
        total_before=dense,
        total=own + common,
        active_before=active / experts * dense,
        active=active / experts * own + common,
        per_expert=active * (own_run / experts + common),
        once=active / experts * own_run + common_run,
        bytes_before=dense * itemsize,
        bytes=_bytes([*matrices, shared], itemsize),
    )


def _linear_counts(pair: FactoredLinear, itemsize: int) -> FactorCounts:
    """Of a linear map of shared experts, which every token uses."""
    dense, held = pair.left.out_features * pair.right.in_features, _numbers([pair], {})
    return FactorCounts(
        total_before=dense,
        total=held,
        active_before=dense,
        active=held,
        per_expert=held,
        once=held,
        bytes_before=dense * itemsize,
        bytes=_bytes([pair], itemsize),
    )


def _numbers(modules: Iterable[nn.Module], times: dict[int, float]) -> float:
    """Weights that the modules hold, packed ones as the numbers that they stand for, each as often as it multiplies."""
    return sum(
        _weights(module, name, parameter) * times.get(id(module), 1)
        for root in modules
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and name != BIAS
    )


def _weights(module: Any, name: str, parameter: nn.Parameter) -> int:
    if name not in PACKED:
        return parameter.numel()
    return module.weight_like.numel() if name == PACKED[0] else 0


def _bytes(modules: Iterable[nn.Module], itemsize: int) -> int:
    """What they take of a file: packed words and masks as they are, all else in `itemsize` bytes a number."""
    found = 0
    for module in (module for root in modules for module in root.modules()):
        held = {name: p for name, p in module._parameters.items() if p is not None and name != BIAS}
        found += sum(p.numel() * (p.element_size() if name == PACKED[0] else itemsize) for name, p in held.items())
        found += sum(
            buffer.numel() * buffer.element_size() for buffer in module._buffers.values() if buffer is not None
        )
    return found
