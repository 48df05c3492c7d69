"""compressed-tensors' `pack-quantized`: codes packed into int32 words along the inputs, a scale a group; symmetric.

Experts have one scheme, all other linear maps another: that is as far as stock loaders tell schemes apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.registry import (
    Config,
    Format,
    Grid,
    Loaders,
    Packing,
    Request,
    Writer,
    common_bits,
    storage_format,
    vllm_integers,
)
from moe_compress.checkpoints.formats.stored_weight import PackedWeight
from moe_compress.models.modeling.bit_packing import WORD, pack

EXPERTS = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True, slots=True)
class CompressedTensorsWeight(PackedWeight):
    """`X.weight_packed` int32 [O, W], `X.weight_scale` [O, G] and `X.weight_shape` for `X.weight`."""

    scale: Any
    words: Any
    shape: Any

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight_packed", ".weight_shape")
    SIGN: ClassVar[str] = ".weight_packed"

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """Words int32 [O, W], scales [O, G], bits and inputs."""
        words_OW, inputs = self.words[...], int(self.shape[...][1])
        return words_OW, self.scale[...], self.bits or words_OW.shape[1] * WORD // inputs, inputs

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids; empty if they fit."""
        scales, words = list(self.scale.shape), list(self.words.shape)
        return "" if on_a_grid(scales, words, grids) else f"has scales {scales} and codes {words}"


def on_a_grid(scales: Sequence[int], words: Sequence[int], grids: Sequence[Grid]) -> bool:
    """Whether scales [O, G] and packed codes [O, W] of these shapes are those of one of the grids."""
    if len(scales) != 2 or len(words) != 2 or scales[0] != words[0]:
        return False
    return any(
        scales[1] == 1 if not grid.group_size else words[1] == math.ceil(scales[1] * grid.group_size * grid.bits / WORD)
        for grid in grids
    )


def _parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> CompressedTensorsWeight:
    return CompressedTensorsWeight(scale_OG.contiguous(), pack(codes_OI, bits), torch.tensor(codes_OI.shape), bits=bits)


def _unreadable(config: Config) -> str:
    if config.get("format") != "pack-quantized":
        return "which is not read"
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") or {}
        if not weights.get("symmetric", True):
            return f"which is not read with zero points (group {name!r})"
        if weights.get("num_bits") not in range(2, 9) or not group.get("targets"):
            return f"whose group {name!r} lacks num_bits or targets"
        if weights.get("strategy") not in ("channel", "group") or (weights["strategy"] == "group") != bool(
            weights.get("group_size")
        ):
            return f"whose group {name!r} says no strategy and group_size that are read"
    return "" if groups else "whose config_groups are missing"


def _grids(config: Config) -> list[Grid]:
    pairs = [(group["targets"], group["weights"]) for group in config["config_groups"].values()]
    return [
        Grid(bits=weights["num_bits"], group_size=weights.get("group_size") or 0, targets=tuple(targets))
        for targets, weights in pairs
    ]


def _config(packing: Packing) -> dict[str, Any]:
    """One scheme for experts, one for all other linear maps, where there are any."""
    matrices = [(index, matrix) for index, found in packing.matrices.items() for matrix in found]
    schemes = {m.kind == "experts": _scheme(packing, packing.group_sizes[index, m.name]) for index, m in matrices}
    groups: dict[str, Any] = {}
    if True in schemes:
        groups["experts"] = {"targets": [EXPERTS], "weights": schemes[True]}
    if False in schemes:
        names = {matrix.name for _, matrix in matrices if matrix.kind != "experts" and matrix.name}
        groups["others"] = {"targets": [_target(name) for name in sorted(names)], "weights": schemes[False]}
    for group in groups.values():
        group |= {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(rf"re:.*\b{re.escape(name)}\..*" for name in packing.towers)],
    }


def _scheme(packing: Packing, group_size: int) -> dict[str, Any]:
    """A symmetric grid of whole numbers as compressed-tensors says it."""
    strategy = {"strategy": "channel"} if packing.whole_rows else {"strategy": "group", "group_size": group_size}
    return {"num_bits": packing.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}


def _target(name: str) -> str:
    """The linear maps of this name. A target with `experts` in it would be taken for that of experts."""
    return r"re:.*layers\.\d+\." + re.escape(name).replace("experts", "expert[s]") + "$"


def _refuses(request: Request) -> str:
    return "" if "experts" in request.kinds else "is read by stock transformers only where experts are packed, too"


@storage_format("compressed-tensors")
def compressed_tensors() -> Format:
    """`pack-quantized` of compressed-tensors, symmetric."""
    return Format(
        layouts=(CompressedTensorsWeight,),
        described="compressed-tensors pack-quantized",
        unreadable=_unreadable,
        grids=_grids,
        settings=lambda config: common_bits(_grids(config)),
        foreign=("weight_zero_point", "weight_g_idx", "weight_global_scale"),
        loaders=Loaders(
            transformers=(True, "with compressed-tensors installed; weights are made dense"),
            vllm=vllm_integers,
            llama_cpp=(True, "not tried: convert_hf_to_gguf.py makes the weights dense"),
        ),
        writer=Writer(
            parts=_parts,
            config=_config,
            shared={
                "the experts": lambda kind: kind == "experts",
                "the other linear maps": lambda kind: kind != "experts",
            },
            refuses=_refuses,
        ),
    )
