"""FP8 weights with one scale for a block of them, as DeepSeek-V3 is published, or for a matrix or its rows.

O outputs, I inputs, B blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.element_layouts import ElementWeight
from moe_compress.checkpoints.formats.float_codes import spread
from moe_compress.checkpoints.formats.grid import LINEAR, Grid
from moe_compress.checkpoints.formats.registry import (
    CodedMatrix,
    Config,
    Format,
    Loaders,
    Packing,
    Request,
    Writer,
    leave_out_modules,
    storage_format,
)
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

SCALE_BYTES = 4
BITS, BLOCK = 8, (128, 128)
# How configs spell the numbers.
FMT = ("e4m3", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Fp8Weight(StoredWeight):
    """A matrix [O, I] of 8-bit floating-point numbers, and a factor for every block of it, in fp32."""

    scale: Any
    codes: Any
    activation_scale: Any = None
    block: tuple[int, int] | None = field(default=(128, 128), kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale_inv", ".weight")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".activation_scale",)
    SIGN: ClassVar[str] = ".weight_scale_inv"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I]."""
        codes_OI = self.codes[...].float()
        return codes_OI * spread(self.scale[...].float(), codes_OI.shape, self.block)


def _unreadable(config: Config) -> str:
    blocks = config.get("weight_block_size")
    two = isinstance(blocks, list | tuple) and [type(size) is int and size > 0 for size in blocks] == [True, True]
    if config.get("quant_algo"):
        return f"which is not read with quant_algo={config['quant_algo']} beside it"
    good = (two or blocks is None) and config.get("fmt", FMT[0]) in FMT
    return "" if good else "which is not read (e4m3 in blocks, or with a scale for a matrix or its rows, is)"


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out, and what is inside them."""
    kept = "|".join(re.escape(name) for name in config.get("modules_to_not_convert") or ())
    ignore = (rf"re:(?:.*\.)?(?:{kept})(?:\.|$)",) if kept else ()
    return [Grid(bits=8, group_size=(config.get("weight_block_size") or (0, 0))[1], targets=(LINEAR,), ignore=ignore)]


def _block(config: Config) -> tuple[int, int] | None:
    blocks = config.get("weight_block_size")
    return None if blocks is None else (int(blocks[0]), int(blocks[1]))


def _scale_bytes(config: Config, _itemsize: int) -> float:
    """One in fp32 for a block, of outputs as well; without blocks there is one for a whole matrix."""
    block = _block(config)
    return SCALE_BYTES / float(block[0]) if block else 0.0


def _parts(matrix: CodedMatrix) -> Fp8Weight:
    """Codes, and the scale of every block in fp32; in memory all of its rows repeat it."""
    return Fp8Weight(matrix.scale_OG[:: BLOCK[0]].float().contiguous(), matrix.codes_OI.contiguous())


def _config(packing: Packing) -> dict[str, Any]:
    """DeepSeek-V3's, with all that stays plain left out by name."""
    return {
        "quant_method": "fp8",
        "fmt": FMT[0],
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": ["lm_head", *packing.plain],
    }


def _refuses(request: Request) -> str:
    if request.bits != BITS:
        return f"holds {BITS} bits (bits={BITS})"
    return "" if request.group_size == BLOCK[1] else f"has blocks of {BLOCK[0]} x {BLOCK[1]} (group_size={BLOCK[1]})"


@storage_format("fp8", implies={"bits": "8"})
def fp8() -> Format:
    """Floating-point numbers e4m3 with a factor for every block."""
    return Format(
        layouts=(Fp8Weight, ElementWeight),
        described="fp8 (e4m3)",
        unreadable=_unreadable,
        grids=_grids,
        settings=lambda config: {"block": _block(config)},
        leave_out=leave_out_modules,
        scale_bytes=_scale_bytes,
        kept_by_stock=True,
        loaders=Loaders(),
        writer=Writer(
            parts=_parts,
            numbers="fp8 blocks",
            inputs=BLOCK[1],
            config=_config,
            scale_dtype=torch.float32,
            refuses=_refuses,
        ),
    )
