"""What compressed-tensors' config says of what is written: a scheme for experts, and one for all other linear maps.

That is as far as stock loaders tell schemes apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moe_compress.checkpoints.formats.registry import Packing, Request

if TYPE_CHECKING:
    from moe_compress.models.matrices import Kind

EXPERTS = r"re:.*\.experts\.\d+\..*"
ALIKE: Mapping[str, Callable[[Kind], bool]] = {
    "the experts": lambda kind: kind == "experts",
    "the other linear maps": lambda kind: kind != "experts",
}


def integers(packing: Packing, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    """A grid of whole numbers as compressed-tensors says it."""
    strategy = {"strategy": "channel"} if packing.whole_rows else {"strategy": "group", "group_size": group_size}
    return {"num_bits": packing.bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}


def scheme_config(
    packing: Packing,
    weights: Callable[[Packing, int], dict[str, Any]] = integers,
    inputs: Mapping[str, Any] | None = None,
    format: str = "pack-quantized",
) -> dict[str, Any]:
    """One scheme for experts, one for all other linear maps, where there are any; one for both where they are equal.

    weights: of so many inputs that share a scale; inputs: how engines round what matrices are given, None: not at all.
    """
    every = [(index, matrix) for index, found in packing.matrices.items() for matrix in found]
    matrices = [(index, matrix) for index, matrix in every if packing.group_sizes[index, matrix.name]]
    schemes = {m.kind == "experts": weights(packing, packing.group_sizes[index, m.name]) for index, m in matrices}
    groups: dict[str, Any] = {}
    if True in schemes:
        groups["experts"] = {"targets": [EXPERTS], "weights": schemes[True]}
    if False in schemes:
        names = {matrix.name for _, matrix in matrices if matrix.kind != "experts" and matrix.name}
        others = [_target(name) for name in sorted(names)]
        if groups and schemes[True] == schemes[False]:  # llama.cpp's converter takes one group alone
            groups["experts"]["targets"] += others
        else:
            groups["others"] = {"targets": others, "weights": schemes[False]}
    for group in groups.values():
        group |= {"input_activations": inputs, "output_activations": None, "format": format}
    towers = [rf".*\b{re.escape(name)}\..*" for name in packing.towers]
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(f"re:{pattern}" for pattern in (*packing.beside, *towers))],
    }


def _target(name: str) -> str:
    """The linear maps of this name. A target with `experts` in it would be taken for that of experts."""
    return r"re:.*layers\.\d+\." + re.escape(name).replace("experts", "expert[s]") + "$"


def refuses(request: Request) -> str:
    """Why stock loaders could not read it; empty if they can."""
    return "" if "experts" in request.kinds else "is read by stock transformers only where experts are packed, too"
