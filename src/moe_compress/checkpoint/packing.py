"""Weights that files hold as several tensors, read as the numbers they stand for, and moved as bytes.

Whole codes and scales: the layouts of compressed-tensors and of GPTQ. Floating-point codes, scales of blocks: FP8 as
DeepSeek-V3 is published, MXFP4 as GPT-OSS is. O outputs, I inputs, G groups of inputs, W words, E experts, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moe_compress.model.codes import WORD, dequantized, pack, unpack

# What a matrix of another kind of packing has beside its codes: it is not read.
FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
# Numbers of 4 bits with 2 of exponent, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of several tensors, which are read when they are asked for; `[...]` is its numbers.

    NAMES: how its tensors end, that which tells the dtype first; SIGN: the one by which it is known.
    """

    NAMES: ClassVar[tuple[str, ...]] = ()
    SIGN: ClassVar[str] = ""
    END: ClassVar[str] = ".weight"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers."""
        raise NotImplementedError

    def get_dtype(self) -> str:
        """As a safetensors slice says it."""
        return "F32"

    @classmethod
    def stem(cls, name: str) -> str:
        """What the names of its tensors begin with, from the name of the weight."""
        return name.removesuffix(cls.END)

    @property
    def _held(self) -> list[str]:
        return [each.name for each in fields(self) if not each.kw_only]

    def parts(self) -> dict[str, Any]:
        """What it is made of, by how the names end."""
        return dict(zip(self.NAMES, (getattr(self, name) for name in self._held), strict=True))

    def each(self, change: Callable[[Any], Any]) -> Self:
        """The same with something else in place of each part."""
        return replace(self, **{name: change(getattr(self, name)) for name in self._held})


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


@dataclass(frozen=True, slots=True)
class Mxfp4Weight(StoredWeight):
    """All experts' matrices [E, O, I]: blocks of 32 inputs with a power of two each, two codes a byte (GPT-OSS).

    Its numbers come as the model computes with them, [E, I, O], in bf16, which holds them exactly.
    """

    scale: Any
    codes: Any

    NAMES: ClassVar[tuple[str, ...]] = ("_scales", "_blocks")
    SIGN: ClassVar[str] = "_blocks"
    END: ClassVar[str] = ""

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [E, I, O]."""
        octets, exponent_EOB = self.codes[...], self.scale[...].int() - E8M0_BIAS
        value = torch.tensor([*E2M1, *(-number for number in E2M1)])
        number = torch.stack([value[(octets & 15).int()], value[(octets >> 4).int()]], -1).flatten(-2)
        return torch.ldexp(number, exponent_EOB.unsqueeze(-1)).flatten(-2).transpose(1, 2).bfloat16()

    def experts(self, chosen: Sequence[int]) -> Mxfp4Weight:
        """The same of some experts, as they are."""
        return self.each(lambda part: part[...][list(chosen)])


LAYOUTS: dict[str, tuple[type[StoredWeight], ...]] = {
    "compressed-tensors": (PackedWeight,),
    "gptq": (GptqWeight,),
    "fp8": (Fp8Weight,),
    "mxfp4": (Mxfp4Weight,),
}


def stored_parts(name: str, weight: StoredWeight) -> dict[str, Any]:
    """A weight by the names of its tensors."""
    return {f"{weight.stem(name)}{end}": part for end, part in weight.parts().items()}


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json alone knows of its stored weights, for their classes: bits, or the size of blocks.

    bits: the width of all packed matrices, where there is one: narrow matrices do not tell 3 bits from 4.
    """
    config = values.get("quantization_config") or {}
    if config.get("quant_method") == "fp8":
        return {"block": tuple(config["weight_block_size"])}
    if config.get("quant_method") == "mxfp4":
        return {}
    groups = config.get("config_groups", {}).values()
    found = {config.get("bits"), *(group["weights"]["num_bits"] for group in groups if group.get("weights"))} - {None}
    return {"bits": found.pop()} if len(found) == 1 else {}


def with_weights(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with one StoredWeight in place of its parts, as the config `values` say they are stored.

    Raises ValueError for a matrix that is packed in another way, or whose parts are not all there.
    """
    config, settings = values.get("quantization_config"), settings_of(values)
    if not config:
        signs = tuple(layout.SIGN for layouts in LAYOUTS.values() for layout in layouts)
        packed = next((name for name in tensors if name.endswith(signs)), None)
        if packed is not None:
            raise ValueError(f"{packed} is packed, but config.json has no quantization_config that says how.")
        return dict(tensors)
    layouts, found = LAYOUTS[config["quant_method"]], dict(tensors)
    for name in tensors:
        if name.endswith(FOREIGN):
            stem, _, last = name.rpartition(".")
            raise ValueError(f"{stem} is packed with {last}, which is not read: use a bf16 copy, or symmetric weights.")
        for layout in layouts:
            if not name.endswith(layout.SIGN):
                continue
            stem = name.removesuffix(layout.SIGN)
            parts = [f"{stem}{end}" for end in layout.NAMES]
            absent = [part for part in parts if part not in tensors]
            if absent:
                raise ValueError(f"{absent[0]} is missing beside {name}: fetch the checkpoint again.")
            held = [found.pop(part) for part in parts]
            found[f"{stem}{layout.END}"] = layout(*held, **settings)
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
