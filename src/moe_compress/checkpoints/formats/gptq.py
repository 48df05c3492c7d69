"""GPTQ's layout: codes packed along the inputs, zero points beside them, and the group of every input.

Written are symmetric ones, inputs in their order. O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.compressed_tensors import on_a_grid
from moe_compress.checkpoints.formats.grid import LINEAR, Grid
from moe_compress.checkpoints.formats.registry import (
    CodedMatrix,
    Config,
    Format,
    Loaders,
    Packing,
    Writer,
    common_bits,
    storage_format,
    vllm_integers,
)
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, transposed
from moe_compress.models.modeling.bit_packing import WORD, dequantized, pack, unpack

KEPT = "-:"
SCALE_BYTES = 2
# What this package calls all matrices of one kind of a layer's experts.
PART = re.compile(r"experts\\\.(gate|up|down)\$$")
# By the name of the layout: what zero points are stored less by.
LESS = {"gptq": 1, "gptq_v2": 0}
# Before writers said which, there was one.
FIRST = "gptq"


@dataclass(frozen=True, slots=True)
class GptqWeight(PackedWeight):
    """`X.qweight` packed along inputs [W, O], `X.qzeros` [G, W'], `X.scales` [G, O] and `X.g_idx` [I].

    regular: symmetric, inputs in their order, which stays packed in memory; less: what zero points are stored less by.
    """

    scale: Any
    words: Any
    zeros: Any
    g_idx: Any
    regular: bool = field(default=True, kw_only=True)
    less: int = field(default=1, kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = (".scales", ".qweight", ".qzeros", ".g_idx")
    SIGN: ClassVar[str] = ".qweight"

    @property
    def stays_packed(self) -> bool:
        """Where a code and a scale say all."""
        return self.regular

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """The same, whatever the layout. ValueError for zero points or an order of inputs that say something."""
        words_OW, scale_OG, bits, inputs = self._unchecked()
        groups, index_I = scale_OG.shape[1], self.g_idx[...]
        in_order = torch.equal(index_I.long(), torch.arange(inputs) // (inputs // groups))
        if not in_order or not torch.equal(self.zeros[...], _middle(groups, len(words_OW), bits, self.less)):
            raise ValueError(
                "a gptq matrix has zero points, or inputs in an order of their own, but config.json says sym=true and "
                "desc_act=false: fetch the checkpoint again."
            )
        return words_OW, scale_OG, bits, inputs

    def _unchecked(self) -> tuple[Tensor, Tensor, int, int]:
        words_OW, scale_OG = transposed(self.words[...]), transposed(self.scale[...])
        inputs = len(self.g_idx[...])
        return words_OW, scale_OG, self.bits or words_OW.shape[1] * WORD // inputs, inputs

    def __getitem__(self, _everything: Any) -> Tensor:
        """The weights [O, I]."""
        if self.regular:
            codes_OI, scale_OG, _ = self.codes()
            return dequantized(codes_OI, scale_OG)
        words_OW, scale_OG, bits, inputs = self._unchecked()
        # Codes and zero points alike come out half a range lower than they are.
        zeros_OG = unpack(self.zeros[...], bits, len(words_OW)).T.int() + self.less
        group_I = self.g_idx[...].long()
        return (unpack(words_OW, bits, inputs) - zeros_OG[:, group_I]).to(scale_OG.dtype) * scale_OG[:, group_I]

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids; empty if they fit."""
        scales, words = list(self.scale.shape), list(self.words.shape)
        return "" if on_a_grid(scales[::-1], words[::-1], grids) else f"has scales {scales} and codes {words}"


def _middle(groups: int, outputs: int, bits: int, less: int = 1) -> Tensor:
    """Packed zero points that are all half of the range, of which this layout stores one less."""
    return pack(torch.full((groups, outputs), -less, dtype=torch.int8), bits)


def _parts(matrix: CodedMatrix) -> GptqWeight:
    codes_OI, scale_OG, bits = matrix.codes_OI, matrix.scale_OG, matrix.bits
    (outputs, inputs), groups = codes_OI.shape, scale_OG.shape[1]
    index_I = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    words_WO = pack(codes_OI, bits).T.contiguous()
    return GptqWeight(scale_OG.T.contiguous(), words_WO, _middle(groups, outputs, bits), index_I, bits=bits)


def _unreadable(config: Config) -> str:
    wanted = {"sym": (True, False), "desc_act": (True, False, None), "checkpoint_format": (*LESS, None)}
    for key, allowed in wanted.items():
        if config.get(key) not in allowed:
            return f"which is not read with {key}={config.get(key)}"
    if not isinstance(config.get("bits"), int) or not isinstance(config.get("group_size"), int):
        return "which lacks bits or group_size"
    others = [pattern for pattern in config.get("dynamic") or () if not pattern.startswith(KEPT)]
    return f"which is not read with settings of their own for {others[0]}" if others else ""


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out."""
    left = [name.removeprefix(KEPT) for name in config.get("dynamic") or () if name.startswith(KEPT)]
    kept = "|".join(PART.sub(r"experts\\..*$", pattern) for pattern in left)
    ignore = (rf"re:(?:{kept})$",) if kept else ()
    return [Grid(bits=config["bits"], group_size=max(config["group_size"], 0), targets=(LINEAR,), ignore=ignore)]


def _regular(config: Config) -> bool:
    return bool(config["sym"] and not config.get("desc_act"))


def _settings(config: Config) -> dict[str, Any]:
    regular = _regular(config)
    return {**common_bits(_grids(config)), "regular": regular, "less": LESS[config.get("checkpoint_format") or FIRST]}


def _config(packing: Packing) -> dict[str, Any]:
    """Linear maps that are not packed are left out by name."""
    packed = {matrix.name for found in packing.matrices.values() for matrix in found}
    group_size = next(size for (_, name), size in packing.group_sizes.items() if name in packed)
    others = [rf".*layers\.\d+\.{re.escape(name)}$" for name in sorted(packing.others)]
    towers = [rf".*\b{re.escape(name)}\..*" for name in packing.towers]
    return {
        "quant_method": "gptq",
        "bits": packing.bits,
        "group_size": -1 if packing.whole_rows else group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"{KEPT}{pattern}": {} for pattern in (*others, *packing.beside, *towers)},
    }


def _leave_out(config: Config, names: Sequence[str]) -> dict[str, Any]:
    left: dict[str, Any] = {rf"{KEPT}.*{re.escape(name)}(?:\..*)?": {} for name in names}
    return {**config, "dynamic": {**(config.get("dynamic") or {}), **left}}


@storage_format("gptq")
def gptq() -> Format:
    """GPTQ's own layout, written symmetric and without act-order; scales are fp16, all that it knows."""
    return Format(
        layouts=(GptqWeight,),
        described="gptq",
        unreadable=_unreadable,
        grids=_grids,
        settings=_settings,
        whole_codes=_regular,
        leave_out=_leave_out,
        # fp16, and a zero point of as many bits as a weight.
        scale_bytes=lambda config, _: {config["bits"]: SCALE_BYTES + config["bits"] / 8},
        loaders=Loaders(
            transformers=lambda _: (
                False,
                "fused experts are not loaded from GPTQ's layout: use moe_compress.load, gptqmodel or vLLM",
            ),
            vllm=lambda config: vllm_integers([config["bits"]]),
            llama_cpp=lambda _: (True, "not tried: convert_hf_to_gguf.py makes the weights dense"),
        ),
        writer=Writer(
            parts=_parts,
            config=_config,
            shared={"its matrices": lambda _: True},
            scale_dtype=torch.float16,
            excepts=True,
        ),
    )
