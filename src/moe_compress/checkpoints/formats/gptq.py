"""GPTQ's layout: codes packed along the inputs, zero points beside them; symmetric, inputs in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.compressed_tensors import on_a_grid
from moe_compress.checkpoints.formats.registry import (
    Config,
    Format,
    Grid,
    Loaders,
    Packing,
    Writer,
    common_bits,
    storage_format,
    vllm_integers,
)
from moe_compress.checkpoints.formats.stored_weight import PackedWeight
from moe_compress.models.modeling.bit_packing import WORD, pack

KEPT = "-:"


@dataclass(frozen=True, slots=True)
class GptqWeight(PackedWeight):
    """`X.qweight` packed along inputs [W, O], `X.qzeros` [G, W'], `X.scales` [G, O] and `X.g_idx` [I]."""

    scale: Any
    words: Any
    zeros: Any
    g_idx: Any

    NAMES: ClassVar[tuple[str, ...]] = (".scales", ".qweight", ".qzeros", ".g_idx")
    SIGN: ClassVar[str] = ".qweight"

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """The same, whatever the layout. ValueError for zero points or an order of inputs that say something."""
        words_OW, scale_OG = self.words[...].T.contiguous(), self.scale[...].T.contiguous()
        index_I, inputs = self.g_idx[...], len(self.g_idx[...])
        bits, groups = self.bits or words_OW.shape[1] * WORD // inputs, scale_OG.shape[1]
        in_order = torch.equal(index_I.long(), torch.arange(inputs) // (inputs // groups))
        if not in_order or not torch.equal(self.zeros[...], _middle(groups, len(words_OW), bits)):
            raise ValueError("a gptq matrix has zero points, or inputs in an order of their own: it is not read.")
        return words_OW, scale_OG, bits, inputs

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids; empty if they fit."""
        scales, words = list(self.scale.shape), list(self.words.shape)
        return "" if on_a_grid(scales[::-1], words[::-1], grids) else f"has scales {scales} and codes {words}"


def _middle(groups: int, outputs: int, bits: int) -> Tensor:
    """Packed zero points that are all half of the range, of which this layout stores one less."""
    return pack(torch.full((groups, outputs), -1, dtype=torch.int8), bits)


def _parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> GptqWeight:
    (outputs, inputs), groups = codes_OI.shape, scale_OG.shape[1]
    index_I = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    words_WO = pack(codes_OI, bits).T.contiguous()
    return GptqWeight(scale_OG.T.contiguous(), words_WO, _middle(groups, outputs, bits), index_I, bits=bits)


def _unreadable(config: Config) -> str:
    wanted = {"sym": (True,), "desc_act": (False, None), "checkpoint_format": ("gptq",)}
    for key, allowed in wanted.items():
        if config.get(key) not in allowed:
            return f"which is not read with {key}={config.get(key)}"
    if not isinstance(config.get("bits"), int) or not isinstance(config.get("group_size"), int):
        return "which lacks bits or group_size"
    others = [pattern for pattern in config.get("dynamic") or () if not pattern.startswith(KEPT)]
    return f"which is not read with settings of their own for {others[0]}" if others else ""


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out."""
    kept = "|".join(name.removeprefix(KEPT) for name in config.get("dynamic") or () if name.startswith(KEPT))
    target = rf"re:(?!(?:{kept})$).*" if kept else "re:.*"
    return [Grid(bits=config["bits"], group_size=max(config["group_size"], 0), targets=(target,))]


def _config(packing: Packing) -> dict[str, Any]:
    """Linear maps that are not packed are left out by name."""
    packed = {matrix.name for found in packing.matrices.values() for matrix in found}
    group_size = next(size for (_, name), size in packing.group_sizes.items() if name in packed)
    return {
        "quant_method": "gptq",
        "bits": packing.bits,
        "group_size": -1 if packing.whole_rows else group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {
            **{rf"{KEPT}.*layers\.\d+\.{re.escape(name)}$": {} for name in sorted(packing.others)},
            **{rf"{KEPT}.*\b{re.escape(name)}\..*": {} for name in packing.towers},
        },
    }


@storage_format("gptq")
def gptq() -> Format:
    """GPTQ's own layout, symmetric and without act-order; scales are fp16, all that it knows."""
    return Format(
        layouts=(GptqWeight,),
        described="gptq (symmetric, without act-order)",
        unreadable=_unreadable,
        grids=_grids,
        settings=lambda config: common_bits(_grids(config)),
        loaders=Loaders(
            transformers=(
                False,
                "fused experts are not loaded from GPTQ's layout: use moe_compress.load, gptqmodel or vLLM",
            ),
            vllm=vllm_integers,
            llama_cpp=(True, "not tried: convert_hf_to_gguf.py makes the weights dense"),
        ),
        writer=Writer(parts=_parts, config=_config, shared={"its matrices": lambda _: True}, scale_dtype=torch.float16),
    )
