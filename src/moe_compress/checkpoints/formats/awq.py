"""AWQ's layout (GEMM): codes packed along the outputs, eight a word in an order of their own, zero points beside them.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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
from moe_compress.models.modeling.bit_packing import parts_of_bytes

BITS, HALF = 4, 8
# Which of eight neighbours lies in which place of a word, low bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# fp16 beside a zero point of 4 bits.
SCALE_BYTES = 2.5


@dataclass(frozen=True, slots=True)
class AwqWeight(StoredWeight):
    """`X.qweight` [I, O / 8], `X.qzeros` [G, O / 8] and `X.scales` [G, O] for `X.weight`."""

    scale: Any
    words: Any
    zeros: Any

    NAMES: ClassVar[tuple[str, ...]] = (".scales", ".qweight", ".qzeros")
    SIGN: ClassVar[str] = ".qweight"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I], in the dtype of the scales."""
        codes_IO, zeros_GO, scale_GO = in_order(self.words[...]), in_order(self.zeros[...]), self.scale[...]
        number_GiO = codes_IO.unflatten(0, (len(scale_GO), -1)) - zeros_GO.unsqueeze(1)
        return (number_GiO.to(scale_GO.dtype) * scale_GO.unsqueeze(1)).flatten(0, 1).T.contiguous()


def in_order(words: Tensor) -> Tensor:
    """Codes from 0 up, int8 [..., O], of words int32 [..., O / 8]."""
    codes = parts_of_bytes(words.contiguous().view(torch.uint8), BITS).view(torch.int8)
    place = torch.tensor(ORDER, device=words.device).argsort()
    return codes.unflatten(-1, (-1, len(ORDER)))[..., place].flatten(-2)


def words_of(codes: Tensor) -> Tensor:
    """The same backwards."""
    parts = codes.unflatten(-1, (-1, len(ORDER)))[..., list(ORDER)].flatten(-2).to(torch.uint8)
    return (parts[..., ::2] | parts[..., 1::2] << 4).contiguous().view(torch.int32)


def _unreadable(config: Config) -> str:
    wanted = {"bits": (BITS,), "zero_point": (True,), "version": ("gemm", "GEMM", None)}
    for key, allowed in wanted.items():
        if config.get(key) not in allowed:
            return f"which is not read with {key}={config.get(key)}"
    size = config.get("group_size")
    return "" if isinstance(size, int) and not isinstance(size, bool) else "which lacks group_size"


def _grids(config: Config) -> list[Grid]:
    """Every linear map in whose name nothing stands that is left out."""
    kept = "|".join(re.escape(name) for name in config.get("modules_to_not_convert") or ())
    ignore = (rf"re:.*(?:{kept})",) if kept else ()
    return [Grid(bits=BITS, group_size=max(config["group_size"], 0), targets=(LINEAR,), ignore=ignore)]


def _parts(matrix: CodedMatrix) -> AwqWeight:
    """Codes and zero points from 0 up, eight outputs a word."""
    assert matrix.zero_OG is not None
    codes, zeros = (words_of(each.T.contiguous() + HALF) for each in (matrix.codes_OI, matrix.zero_OG))
    return AwqWeight(matrix.scale_OG.T.contiguous(), codes, zeros)


def _config(packing: Packing) -> dict[str, Any]:
    """All that stays plain is left out by name."""
    packed = {matrix.name for found in packing.matrices.values() for matrix in found}
    group_size = next(size for (_, name), size in packing.group_sizes.items() if name in packed)
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": -1 if packing.whole_rows else group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *packing.plain],
    }


def _refuses(request: Request) -> str:
    return "" if request.bits == BITS else f"holds {BITS} bits (bits={BITS})"


@storage_format("awq")
def awq() -> Format:
    """AWQ's own layout, 4 bits with zero points, of the version that engines read (GEMM)."""
    return Format(
        layouts=(AwqWeight,),
        described="awq (GEMM, 4 bits)",
        unreadable=_unreadable,
        grids=_grids,
        leave_out=leave_out_modules,
        scale_bytes=lambda _config, _itemsize: {BITS: SCALE_BYTES},
        loaders=Loaders(
            transformers=lambda _: (
                False,
                "fused experts are not loaded from AWQ's layout: use moe_compress.load or vLLM",
            ),
            vllm=lambda _: (True, "not tried: by its AWQ kernels (a GPU)"),
            llama_cpp=lambda _: (False, "its converter knows no AWQ layout"),
            card="stock transformers does not load fused experts from them",
        ),
        writer=Writer(
            parts=_parts,
            numbers="asymmetric",
            config=_config,
            shared={"its matrices": lambda _: True},
            scale_dtype=torch.float16,
            refuses=_refuses,
        ),
    )
