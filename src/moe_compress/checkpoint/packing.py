"""Packed weights in files, in the layouts of compressed-tensors and of GPTQ, read as the numbers they stand for.

O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.model.codes import WORD, dequantized, pack, unpack

WEIGHT = ".weight"
# What a matrix of another kind of packing has beside its codes: it is not read.
FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
READ = "compressed-tensors pack-quantized, or gptq (symmetric, without act-order)"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix, whose parts are read when they are asked for; `[...]` is its weights, in the scales' dtype.

    compressed-tensors: `X.weight_packed`, `X.weight_scale` and `X.weight_shape` for `X.weight`.
    """

    scale: Any
    words: Any
    shape: Any
    bits: int | None = field(default=None, kw_only=True)

    NAMES: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_packed", "weight_shape")

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

    def get_dtype(self) -> str:
        """As a safetensors slice says it."""
        return "F32"

    def parts(self) -> dict[str, Any]:
        """What it is made of, that of the scales first, by the last part of the names."""
        held = [getattr(self, each.name) for each in fields(self) if each.name != "bits"]
        return dict(zip(self.NAMES, held, strict=True))

    def each(self, change: Callable[[Any], Any]) -> PackedWeight:
        """The same with something else in place of each part."""
        return type(self)(*(change(part) for part in self.parts().values()), bits=self.bits)


@dataclass(frozen=True, slots=True)
class GptqWeight(PackedWeight):
    """GPTQ's own layout: `X.qweight` packed along inputs [W, O], `X.qzeros`, `X.scales` [G, O] and `X.g_idx`."""

    g_idx: Any

    NAMES: ClassVar[tuple[str, ...]] = ("scales", "qweight", "qzeros", "g_idx")

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """The same, whatever the layout."""
        words_OW, scale_OG, inputs = (
            self.words[...].T.contiguous(),
            self.scale[...].T.contiguous(),
            len(self.g_idx[...]),
        )
        return words_OW, scale_OG, self.bits or words_OW.shape[1] * WORD // inputs, inputs


LAYOUTS: tuple[type[PackedWeight], ...] = (PackedWeight, GptqWeight)


def stored_parts(name: str, weight: PackedWeight) -> dict[str, Any]:
    """A matrix by the names of its parts."""
    stem = name.removesuffix(WEIGHT)
    return {f"{stem}.{last}": part for last, part in weight.parts().items()}


def bits_of(values: Mapping[str, Any]) -> int | None:
    """The width of all packed matrices, where config.json knows of one: narrow matrices do not tell 3 bits from 4."""
    config = values.get("quantization_config") or {}
    groups = config.get("config_groups", {}).values()
    found = {config.get("bits"), *(group["weights"]["num_bits"] for group in groups if group.get("weights"))} - {None}
    return found.pop() if len(found) == 1 else None


def with_weights(tensors: Mapping[str, Any], bits: int | None = None) -> dict[str, Any]:
    """Tensors by name, with one PackedWeight in place of its parts. bits: of all of them, if known.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    found: dict[str, Any] = {}
    known = {last: layout for layout in LAYOUTS for last in layout.NAMES}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in FOREIGN:
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or symmetric weights.")
        layout = known.get(last)
        if layout is None or f"{stem}.{layout.NAMES[1]}" not in tensors:
            found[name] = tensor
        elif last == layout.NAMES[1]:
            absent = [f"{stem}.{part}" for part in layout.NAMES if f"{stem}.{part}" not in tensors]
            if absent:
                raise ValueError(f"{absent[0]} is missing beside {name}: fetch the checkpoint again.")
            found[f"{stem}{WEIGHT}"] = layout(*(tensors[f"{stem}.{part}"] for part in layout.NAMES), bits=bits)
    return found


def packed_parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> PackedWeight:
    """compressed-tensors' parts of a matrix."""
    return PackedWeight(scale_OG.contiguous(), pack(codes_OI, bits), torch.tensor(codes_OI.shape), bits=bits)


def gptq_parts(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> GptqWeight:
    """GPTQ's parts of a matrix. Zero points are all half of the range, of which this layout stores one less."""
    inputs, groups = codes_OI.shape[1], scale_OG.shape[1]
    zeros_GO = torch.full((groups, len(codes_OI)), -1, dtype=torch.int8)
    index_I = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    words_WO = pack(codes_OI, bits).T.contiguous()
    return GptqWeight(scale_OG.T.contiguous(), words_WO, pack(zeros_GO, bits), index_I, bits=bits)


def require_readable(folder: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantized checkpoint in a layout that is not read."""
    config = values.get("quantization_config")
    if not config:
        return
    kind, layout = config.get("quant_method", "quantized"), config.get("format", "")
    plain_gptq = config.get("sym") and not config.get("desc_act") and config.get("checkpoint_format") == "gptq"
    if (kind, layout) == ("compressed-tensors", "pack-quantized") or (kind == "gptq" and plain_gptq):
        return
    stored = " ".join([kind, layout]).strip()
    raise ValueError(f"{folder} is stored in {stored} format, which is not read: use a bf16 or fp32 copy, or {READ}.")
