"""How large a model is, part by part, and how large plans would leave it. Counts are parameters, not storage elements.

Four-bit weights are stored several to an element (MXFP4 `*_blocks`, GPTQ and AWQ `qweight`, compressed-tensors
`weight_packed`, bitsandbytes): each code is a parameter; scales and zero points beside them are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import rich.table
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.analysis.layer_info import get_moe_layer_info
from moe_compress.analysis.layer_plan import CompressionPlan
from moe_compress.models.families import ATTENTION as MIXERS

PACKED = ("_blocks", "qweight", "weight_packed")
# What lies beside codes and is no parameter: scales, zero points, orders, shapes.
BESIDE = ("_scales", "scales", "qzeros", "g_idx", "_scale", "_scale_inv", "_zero_point", "weight_shape")
CODE_BITS = 4
ATTENTION = (*MIXERS, "linear_attn")
PARTS = ("total", "expert", "attention", "embeddings", "other")


def estimate_model_size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part: total, expert (routed), attention, embeddings (input and output), other."""
    found = dict.fromkeys(PARTS, 0)
    outer = _embeddings(model)
    attention = tuple(f"{name}." for name, module in model.named_modules() if _is_attention(name, module))
    for name, module, tensor in _stored(model):
        part = "embeddings" if module in outer else _part(name, attention)
        count = parameters_in(name, module, tensor, _bits(model))
        found[part] += count
        found["total"] += count
    return found


def parameters_in(name: str, module: nn.Module, tensor: Tensor, bits: int = CODE_BITS) -> int:
    """How many parameters a tensor of a module stands for; `bits` of a packed code."""
    leaf = name.rpartition(".")[2]
    original = getattr(getattr(tensor, "quant_state", None), "shape", None)
    if original is not None:  # bitsandbytes keeps the shape beside the codes
        return math.prod(original)
    if not tensor.is_floating_point() and leaf.endswith(PACKED):
        return tensor.numel() * tensor.element_size() * 8 // bits
    return 0 if leaf.endswith(BESIDE) and _beside_codes(leaf, module) else tensor.numel()


def _beside_codes(leaf: str, module: nn.Module) -> bool:
    """Whether a tensor belongs to codes that lie beside it: packed ones, or a weight of one byte an element (FP8)."""
    for name, tensor in {**module._parameters, **module._buffers}.items():
        packing = next((suffix for suffix in PACKED if name.endswith(suffix)), None)
        narrow = name != leaf and tensor is not None and tensor.element_size() == 1
        if (packing is not None or narrow) and leaf.startswith(name.removesuffix(packing or "")):
            return True
    return False


def _bits(model: PreTrainedModel) -> int:
    """Bits of a code, as GPTQ and AWQ configs say; 4 where nothing is said."""
    quantized: Any = getattr(model.config, "quantization_config", None) or {}
    said = quantized.get("bits") if isinstance(quantized, dict) else getattr(quantized, "bits", None)
    return int(said or CODE_BITS)


def _stored(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, tensor) of every parameter, once, and of packed weights that are kept as buffers."""
    seen: set[int] = set()
    tied = model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None
    for prefix, module in model.named_modules():
        packed = {n: t for n, t in module._buffers.items() if t is not None and n.endswith(PACKED)}
        for leaf, tensor in {**module._parameters, **packed}.items():
            if tensor is not None and id(tensor) not in seen and module is not tied:
                seen.add(id(tensor))
                yield f"{prefix}.{leaf}", module, tensor


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]


def _is_attention(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in ATTENTION or type(module).__name__.endswith("Attention")


def _part(name: str, attention: tuple[str, ...]) -> str:
    if "experts" in name.split("."):
        return "expert"
    return "attention" if name.startswith(attention) else "other"


def estimate_compressed_size(model: PreTrainedModel, compression_plans: Sequence[CompressionPlan]) -> dict[str, Any]:
    """Parameters before and after plans for a model that none of them was applied to yet.

    original_params, compressed_params, params_removed (experts and their router rows), reduction_ratio (0 to 1),
    expert_params_original, expert_params_compressed.
    """
    before = estimate_model_size(model)
    layers = [plan.layer_idx for plan in compression_plans]
    if None in layers or len(set(layers)) < len(layers):
        raise ValueError(f"every plan must be for a layer of its own (layer_idx); these are for {layers}.")
    experts = rows = 0
    for plan in compression_plans:
        assert plan.layer_idx is not None
        info = get_moe_layer_info(model, plan.layer_idx)
        if info.num_experts != plan.original_num_experts:
            raise ValueError(
                f"layer {info.layer_idx} has {info.num_experts} experts and the plan is for "
                f"{plan.original_num_experts}: estimate before the plan is applied."
            )
        experts += plan.experts_removed * info.expert_params
        rows += plan.experts_removed * info.router_params
    return {
        "original_params": before["total"],
        "compressed_params": before["total"] - experts - rows,
        "params_removed": experts + rows,
        "reduction_ratio": (experts + rows) / before["total"],
        "expert_params_original": before["expert"],
        "expert_params_compressed": before["expert"] - experts,
    }


def print_compression_summary(
    model: PreTrainedModel, compression_plans: Sequence[CompressionPlan], model_name: str = "Model"
) -> None:
    """Print what plans would do to a model: sizes before and after, then a line a layer."""
    size = estimate_compressed_size(model, compression_plans)
    sizes = rich.table.Table("parameters", "before", "after", "removed", title=model_name, box=rich.box.SIMPLE_HEAD)
    for part, before, after in (
        ("total", size["original_params"], size["compressed_params"]),
        ("routed experts", size["expert_params_original"], size["expert_params_compressed"]),
    ):
        removed = f"{before - after:,} ({(before - after) / max(before, 1):.1%})"
        sizes.add_row(part, f"{before:,}", f"{after:,}", removed)
    titles = ("layer", "experts", "merged", "pruned", "memory", "predicted error", "impact")
    layers = rich.table.Table(*titles, box=rich.box.SIMPLE_HEAD)
    for plan in compression_plans:
        error = "" if plan.predicted_error is None else f"{plan.predicted_error:.1%}"
        layers.add_row(
            str(plan.layer_idx),
            f"{plan.original_num_experts} -> {plan.target_num_experts}",
            ", ".join("+".join(map(str, merge.members)) for merge in plan.merges) or "-",
            ", ".join(map(str, plan.pruned_experts)) or "-",
            f"-{plan.estimated_memory_reduction:.1%}",
            error,
            plan.estimated_quality_impact,
        )
    Console().print(sizes, layers)
