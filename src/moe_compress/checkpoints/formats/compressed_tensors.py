"""compressed-tensors' `pack-quantized`: codes packed into int32 words along the inputs, a scale a group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.quantization_config import QUANTIZATION
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, layer_matrices
from moe_compress.models.modeling.bit_packing import WORD, dequantized, pack, unpack


@dataclass(frozen=True, slots=True)
class PackedWeight(StoredWeight):
    """A packed matrix; its numbers come in the scales' dtype.

    compressed-tensors: `X.weight_packed`, `X.weight_scale` and `X.weight_shape` for `X.weight`.
    """

    scale: Any
    words: Any
    shape: Any
    bits: int | None = field(default=None, kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight_packed", ".weight_shape")
    SIGN: ClassVar[str] = ".weight_packed"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The weights [O, I]."""
        codes_OI, scale_OG, _ = self.codes()
        return dequantized(codes_OI, scale_OG)

    def codes(self) -> tuple[Tensor, Tensor, int]:
        """Signed codes int8 [O, I], scales [O, G] and bits."""
        words_OW, scale_OG, bits, inputs = self.packed()
        return unpack(words_OW, bits, inputs), scale_OG, bits

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """Words int32 [O, W], scales [O, G], bits and inputs."""
        words_OW, inputs = self.words[...], int(self.shape[...][1])
        return words_OW, self.scale[...], self.bits or words_OW.shape[1] * WORD // inputs, inputs


def packed_parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> PackedWeight:
    """compressed-tensors' parts of a matrix."""
    return PackedWeight(scale_OG.contiguous(), pack(codes_OI, bits), torch.tensor(codes_OI.shape), bits=bits)


def _packed(config: Mapping[str, Any]) -> str:
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


EXPERTS = r"re:.*\.experts\.\d+\..*"


def scheme(bits: int, group_size: int, whole_rows: bool) -> dict[str, Any]:
    """A symmetric integer grid as compressed-tensors says it."""
    strategy = {"strategy": "channel"} if whole_rows else {"strategy": "group", "group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}


def packed_values(
    model: PreTrainedModel, kinds: Sequence[Kind], experts: Mapping[str, Any] | None, others: Mapping[str, Any] | None
) -> dict[str, Any]:
    """config.json values of a checkpoint whose experts and other chosen linear maps are packed by these schemes."""
    groups: dict[str, Any] = {}
    if experts is not None:
        groups["experts"] = {"targets": [EXPERTS], "weights": dict(experts)}
    if others is not None:
        groups["others"] = {"targets": _patterns(model, kinds), "weights": dict(others)}
    for group in groups.values():
        group |= {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    return {
        QUANTIZATION: {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
    }


def _patterns(model: PreTrainedModel, kinds: Sequence[Kind]) -> list[str]:
    """Targets for the linear maps of these kinds. A target with `experts` in it would be taken for that of experts."""
    family, names = family_of(model.config), set()
    for layer in hf.decoder_layers(model):
        names |= {matrix.name for matrix in layer_matrices(layer, family, [k for k in kinds if k != "experts"])}
    names = {name for name in names if name}
    return [r"re:.*layers\.\d+\." + re.escape(name).replace("experts", "expert[s]") + "$" for name in sorted(names)]
