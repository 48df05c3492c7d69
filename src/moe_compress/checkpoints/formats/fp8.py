"""FP8 weights with one scale for a block of them, as DeepSeek-V3 is published. O outputs, I inputs, B blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from moe_compress.checkpoints.formats.registry import Config, Format, Grid, Loaders, storage_format
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

SCALE_BYTES = 4
# How configs spell it: as DeepSeek does, as MiniMax does after torch's dtype.
E4M3 = ("e4m3", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Fp8Weight(StoredWeight):
    """A matrix [O, I] of 8-bit floating-point numbers, and a factor for every block of it, in fp32."""

    scale: Any
    codes: Any
    block: tuple[int, int] = field(default=(128, 128), kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale_inv", ".weight")
    SIGN: ClassVar[str] = ".weight_scale_inv"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I]."""
        codes_OI, scale_BB = self.codes[...].float(), self.scale[...].float()
        for dim, size in enumerate(self.block):
            scale_BB = scale_BB.repeat_interleave(size, dim).narrow(dim, 0, codes_OI.shape[dim])
        return codes_OI * scale_BB


def _unreadable(config: Config) -> str:
    blocks = config.get("weight_block_size")
    two = isinstance(blocks, list | tuple) and len(blocks) == 2 and all(isinstance(size, int) for size in blocks)
    return "" if two and config.get("fmt", "e4m3") in E4M3 else "which is not read (e4m3 in blocks is)"


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out."""
    kept = "|".join(re.escape(name) for name in config.get("modules_to_not_convert") or ())
    target = rf"re:(?!.*(?:{kept})).*" if kept else "re:.*"
    return [Grid(bits=8, group_size=config["weight_block_size"][1], targets=(target,))]


@storage_format("fp8", written=False)
def fp8() -> Format:
    """Floating-point numbers e4m3 with a factor for every block."""
    return Format(
        layouts=(Fp8Weight,),
        described="fp8 in blocks",
        unreadable=_unreadable,
        grids=_grids,
        settings=lambda config: {"block": tuple(config["weight_block_size"])},
        # One in fp32 for a block of outputs as well.
        scale_bytes=lambda config: SCALE_BYTES / float(config["weight_block_size"][0]),
        loaders=Loaders(),
    )
