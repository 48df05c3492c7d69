"""GPTQ's layout: codes packed along the inputs, zero points beside them; symmetric."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.compressed_tensors import PackedWeight
from moe_compress.checkpoints.formats.quantization_config import QUANTIZATION
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.modeling.bit_packing import WORD, pack


@dataclass(frozen=True, slots=True)
class GptqWeight(PackedWeight):
    """GPTQ's own layout: `X.qweight` packed along inputs [W, O], `X.qzeros`, `X.scales` [G, O] and `X.g_idx`."""

    g_idx: Any

    NAMES: ClassVar[tuple[str, ...]] = (".scales", ".qweight", ".qzeros", ".g_idx")
    SIGN: ClassVar[str] = ".qweight"

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """The same, whatever the layout. ValueError for zero points or an order of inputs that say something."""
        words_OW, scale_OG = self.words[...].T.contiguous(), self.scale[...].T.contiguous()
        index_I, inputs = self.g_idx[...], len(self.g_idx[...])
        bits, groups = self.bits or words_OW.shape[1] * WORD // inputs, scale_OG.shape[1]
        # What lies in the place of compressed-tensors' shape are zero points.
        middle_GO = torch.full((groups, len(words_OW)), -1, dtype=torch.int8)
        in_order = torch.equal(index_I.long(), torch.arange(inputs) // (inputs // groups))
        if not in_order or not torch.equal(self.shape[...], pack(middle_GO, bits)):
            raise ValueError("a gptq matrix has zero points, or inputs in an order of their own: it is not read.")
        return words_OW, scale_OG, bits, inputs


def gptq_parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> GptqWeight:
    """GPTQ's parts of a matrix. Zero points are all half of the range, of which this layout stores one less."""
    inputs, groups = codes_OI.shape[1], scale_OG.shape[1]
    zeros_GO = torch.full((groups, len(codes_OI)), -1, dtype=torch.int8)
    index_I = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    words_WO = pack(codes_OI, bits).T.contiguous()
    return GptqWeight(scale_OG.T.contiguous(), words_WO, pack(zeros_GO, bits), index_I, bits=bits)


def _gptq(config: Mapping[str, Any]) -> str:
    wanted = {"sym": (True,), "desc_act": (False, None), "checkpoint_format": ("gptq",)}
    for key, allowed in wanted.items():
        if config.get(key) not in allowed:
            return f"which is not read with {key}={config.get(key)}"
    if not isinstance(config.get("bits"), int) or not isinstance(config.get("group_size"), int):
        return "which lacks bits or group_size"
    others = [pattern for pattern in config.get("dynamic") or () if not pattern.startswith("-:")]
    return f"which is not read with settings of their own for {others[0]}" if others else ""


def gptq_values(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    packed: Collection[str],
    group_sizes: Mapping[tuple[int, str], int],
) -> dict[str, Any]:
    """config.json values of a checkpoint in GPTQ's layout; linear maps that are not packed are left out by name."""
    family = family_of(model.config)
    kept = {m.name for layer in hf.decoder_layers(model) for m in layer_matrices(layer, family)} - set(packed)
    group_size = next(group_size for (_, name), group_size in group_sizes.items() if name in packed)
    found = {
        "quant_method": "gptq",
        "bits": int(options["bits"]),
        "group_size": group_size if options["group_size"] else -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {rf"-:.*layers\.\d+\.{re.escape(name)}$": {} for name in sorted(kept)},
    }
    return {QUANTIZATION: found}
