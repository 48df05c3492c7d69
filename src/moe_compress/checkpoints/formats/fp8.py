"""FP8 weights with one scale for a block of them, as DeepSeek-V3 is published, or for a matrix or its rows.

DeepSeek-V4 has FP4 experts beside them, with a power of two for 32 inputs, as config.json says apart of its
quantization_config (`expert_dtype`); its scales end otherwise, and are bytes.

O outputs, I inputs, B blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.element_layouts import ElementWeight
from moe_compress.checkpoints.formats.float_codes import e2m1_numbers, spread
from moe_compress.checkpoints.formats.grid import LINEAR, Grid
from moe_compress.checkpoints.formats.registry import (
    EXPERTS,
    CodedMatrix,
    Config,
    Format,
    Loaders,
    Packing,
    Request,
    Writer,
    storage_format,
)
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

SCALE_BYTES = 4
BITS, BLOCK = 8, (128, 128)
# Of experts by `expert_dtype`: bits, inputs that share a scale, and the names of their modules.
FP4, FEW, GROUP, ONE_EXPERT = "fp4", 4, 32, r"re:.*\.experts\.\d+\..*"
PLAIN = "modules_to_not_convert"
# Dtypes in the words of safetensors and of torch.
E4M3, INT8 = ("F8_E4M3", "torch.float8_e4m3fn"), ("I8", "torch.int8")
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


@dataclass(frozen=True, slots=True)
class Fp8BesideScale(Fp8Weight):
    """The same with `X.scale` in place of `X.weight_scale_inv`: hyper-connections have tensors of that name, too."""

    NAMES: ClassVar[tuple[str, ...]] = (".scale", ".weight")
    SIGN: ClassVar[str] = ".scale"

    @classmethod
    def reads(cls, dtypes: Mapping[str, str]) -> bool:
        """Whether it stands beside a weight of such numbers."""
        return dtypes.get(".weight") in E4M3


@dataclass(frozen=True, slots=True)
class Fp4BesideScale(StoredWeight):
    """An expert's matrix `X.weight` int8 [O, I / 2], two E2M1 codes a byte, and powers of two `X.scale` [O, I / 32]."""

    scale: Any
    octets: Any

    NAMES: ClassVar[tuple[str, ...]] = (".scale", ".weight")
    SIGN: ClassVar[str] = ".scale"

    @classmethod
    def reads(cls, dtypes: Mapping[str, str]) -> bool:
        """Whether the weight is one of bytes that are no numbers."""
        return dtypes.get(".weight") in INT8

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I], in fp32."""
        number_OI = e2m1_numbers(self.octets[...].view(torch.uint8))
        return number_OI * spread(self.scale[...].float(), number_OI.shape)

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids; empty if they fit."""
        scales, octets = list(self.scale.shape), list(self.octets.shape)
        sizes = [grid.group_size for grid in grids if grid.bits == FEW]
        fits = any(scales == [octets[0], 2 * octets[1] // size] for size in sizes)
        return "" if fits else f"has scales {scales} and codes {octets}, two a byte"


@dataclass(frozen=True, slots=True)
class Fp4Weight(Fp4BesideScale):
    """The same with `X.weight_scale_inv`, as transformers saves it."""

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale_inv", ".weight")
    SIGN: ClassVar[str] = ".weight_scale_inv"


def _unreadable(config: Config) -> str:
    blocks = config.get("weight_block_size")
    two = isinstance(blocks, list | tuple) and [type(size) is int and size > 0 for size in blocks] == [True, True]
    if config.get("quant_algo"):
        return f"which is not read with quant_algo={config['quant_algo']} beside it"
    good = (two or blocks is None) and config.get("fmt", FMT[0]) in FMT
    return "" if good else "which is not read (e4m3 in blocks, or with a scale for a matrix or its rows, is)"


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out, and what is inside them; experts in fewer bits apart."""
    kept = "|".join(re.escape(name) for name in config.get(PLAIN) or ())
    ignore = (rf"re:(?:.*\.)?(?:{kept})(?:\.|$)",) if kept else ()
    size = (config.get("weight_block_size") or (0, 0))[1]
    grids = [Grid(bits=BITS, group_size=size, targets=(LINEAR,), ignore=ignore)]
    if config.get(EXPERTS) == FP4:
        grids.append(Grid(bits=FEW, group_size=GROUP, targets=(ONE_EXPERT,), ignore=ignore))
    return grids


def _leave_out(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """With more names left out; stock transformers keeps the head plain by itself only where no names are there."""
    kept = config.get(PLAIN)
    return {**config, PLAIN: [*(("lm_head",) if kept is None else kept), *names]}


def _block(config: Config) -> tuple[int, int] | None:
    blocks = config.get("weight_block_size")
    return None if blocks is None else (int(blocks[0]), int(blocks[1]))


def _scale_bytes(config: Config, _itemsize: int) -> dict[int, float]:
    """One in fp32 for a block, of outputs as well, or a byte beside FP4; without blocks, one for a whole matrix."""
    block, few = _block(config), config.get(EXPERTS) == FP4
    return {BITS: (1 if few else SCALE_BYTES) / block[0] if block else 0.0, FEW: 1.0}


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
        PLAIN: ["lm_head", *packing.plain],
    }


def _refuses(request: Request) -> str:
    if request.bits != BITS:
        return f"holds {BITS} bits (bits={BITS})"
    return "" if request.group_size == BLOCK[1] else f"has blocks of {BLOCK[0]} x {BLOCK[1]} (group_size={BLOCK[1]})"


@storage_format("fp8", implies={"bits": "8"})
def fp8() -> Format:
    """Floating-point numbers e4m3 with a factor for every block."""
    return Format(
        layouts=(Fp8BesideScale, Fp4BesideScale, Fp4Weight, Fp8Weight, ElementWeight),
        described="fp8 (e4m3, with experts in fp4 as well)",
        unreadable=_unreadable,
        grids=_grids,
        settings=lambda config: {"block": _block(config)},
        leave_out=_leave_out,
        scale_bytes=_scale_bytes,
        experts=(FP4,),
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
