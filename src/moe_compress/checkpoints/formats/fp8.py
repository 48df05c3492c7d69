"""FP8 weights with one scale for a block of them, as DeepSeek-V3 is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from moe_compress.checkpoints.formats.stored_weight import StoredWeight


@dataclass(frozen=True, slots=True)
class Fp8Weight(StoredWeight):
    """A matrix [O, I] of 8-bit floating-point numbers, and a factor for every block of it (DeepSeek-V3), in fp32."""

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


def _fp8(config: Mapping[str, Any]) -> str:
    blocks = config.get("weight_block_size")
    two = isinstance(blocks, list | tuple) and len(blocks) == 2 and all(isinstance(size, int) for size in blocks)
    return "" if two and config.get("fmt", "e4m3") == "e4m3" else "which is not read (e4m3 in blocks is)"
