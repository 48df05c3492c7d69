"""NVIDIA's ModelOpt exports: NVFP4, FP8 and MXFP8, as `hf_quant_config.json` or config.json says it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moe_compress.checkpoints.formats.element_layouts import ElementWeight
from moe_compress.checkpoints.formats.float_codes import e2m1_numbers, powers_of_two, spread
from moe_compress.checkpoints.formats.fp8 import SCALE_BYTES, Fp8Weight
from moe_compress.checkpoints.formats.grid import INSIDE, LINEAR, Grid
from moe_compress.checkpoints.formats.registry import Config, Format, Loaders, storage_format
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

METHOD, INNER, MIXED = "modelopt", "quantization", "MIXED_PRECISION"
# By what ModelOpt calls them: bits, and inputs that share a scale (0: a whole row or more).
ALGORITHMS = {
    "NVFP4": (4, 16),
    "W4A16_NVFP4": (4, 16),
    "FP8": (8, 0),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 0),
    "FP8_PB_WO": (8, 128),
    "MXFP8": (8, 32),
    "W4A8_MXFP4_FP8": (4, 32),
    "mxfp4": (4, 32),  # it has no name of its own in the exporter
}
# What FP8's scales take: of a matrix, of a row, of a block.
FP8_SCALES = {"FP8": 0.0, "FP8_PER_CHANNEL_PER_TOKEN": float(SCALE_BYTES), "FP8_PB_WO": SCALE_BYTES / 128}


@dataclass(frozen=True, slots=True)
class Nvfp4Weight(StoredWeight):
    """`X.weight` of E2M1 codes [O, I / 2], E4M3 scales `X.weight_scale` [O, G] and a factor `X.weight_scale_2`."""

    factor: Any
    scale: Any
    octets: Any
    input_scale: Any = None

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale_2", ".weight_scale", ".weight")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".input_scale",)
    SIGN: ClassVar[str] = ".weight_scale_2"

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I], in fp32."""
        number_OI = e2m1_numbers(self.octets[...])
        return number_OI * spread(self.scale[...].float() * self.factor[...].float(), number_OI.shape)


@dataclass(frozen=True, slots=True)
class Mxfp4Pair(StoredWeight):
    """`X.weight` of E2M1 codes [O, I / 2] and `X.weight_scale` of exponents [O, G], both bytes."""

    scale: Any
    octets: Any
    input_scale: Any = None

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".input_scale",)
    SIGN: ClassVar[str] = ".weight_scale"
    DTYPES: ClassVar[tuple[str, ...]] = ("U8", "torch.uint8")

    @classmethod
    def reads(cls, dtypes: Mapping[str, str]) -> bool:
        """Whether both are bytes: NVFP4 has other scales, and MXFP8 other codes."""
        return all(dtypes.get(name) in cls.DTYPES for name in cls.NAMES)

    def __getitem__(self, _everything: Any) -> Tensor:
        """The numbers [O, I], in fp32."""
        number_OI = e2m1_numbers(self.octets[...])
        return number_OI * spread(powers_of_two(self.scale[...]), number_OI.shape)


def exported_config(content: Any) -> dict[str, Any] | None:
    """What `hf_quant_config.json` says, as a quantization_config; None where it quantizes no weights."""
    inner = content.get(INNER) if isinstance(content, Mapping) else None
    if not isinstance(inner, Mapping) or not inner.get("quant_algo"):
        return None
    return {"quant_method": METHOD, **content}


def _said(config: Config) -> Config:
    """The settings, which exports for config.json hold one level higher."""
    inner = config.get(INNER)
    return inner if isinstance(inner, Mapping) else config


def _algorithms(config: Config) -> list[str]:
    """What weights are in, each once."""
    said = _said(config)
    if said.get("quant_algo") != MIXED:
        return [str(said.get("quant_algo"))]
    return sorted({str(each.get("quant_algo")) for each in (said.get("quantized_layers") or {}).values()})


def _unreadable(config: Config) -> str:
    odd = [name for name in _algorithms(config) if name not in ALGORITHMS]
    if odd:
        return f"which is not read with quant_algo={odd[0]} ({', '.join(ALGORITHMS)} are)"
    said = _said(config)
    sizes = [each.get("group_size") for each in (said, *(said.get("quantized_layers") or {}).values())]
    if odd_sizes := [size for size in sizes if size is not None and not (type(size) is int and size > 0)]:
        return f"which is not read with group_size={odd_sizes[0]}"
    return "" if _algorithms(config) else "whose quantized_layers are missing"


def _grids(config: Config) -> list[Grid]:
    """Every linear map but those that are left out; with mixed precision, those that are named."""
    said = _said(config)
    ignore = tuple(_pattern(name) for name in said.get("exclude_modules") or said.get("ignore") or ())
    if said.get("quant_algo") != MIXED:
        return [_grid(str(said["quant_algo"]), said.get("group_size"), (LINEAR,), ignore)]
    named: dict[tuple[str, Any], list[str]] = {}
    for name, each in said["quantized_layers"].items():
        named.setdefault((each["quant_algo"], each.get("group_size")), []).append(_pattern(name))
    return [_grid(algorithm, size, tuple(names), ignore) for (algorithm, size), names in named.items()]


def _grid(algorithm: str, group_size: Any, targets: tuple[str, ...], ignore: tuple[str, ...]) -> Grid:
    bits, inputs = ALGORITHMS[algorithm]
    return Grid(bits=bits, group_size=(group_size or inputs) if inputs else 0, targets=targets, ignore=ignore)


def _pattern(name: str) -> str:
    """A module or, with `*`, many of them; what is inside them goes with them."""
    return rf"re:(?:{fnmatch.translate(name)}|{fnmatch.translate(name + '.*')})" if "*" in name else name + INSIDE


def _settings(config: Config) -> dict[str, Any]:
    return {"block": (128, 128)} if "FP8_PB_WO" in _algorithms(config) else {}


def _leave_out(config: Config, names: Sequence[str]) -> dict[str, Any]:
    said = _said(config)
    key = "exclude_modules" if "exclude_modules" in said else "ignore"
    left = {**said, key: [*(said.get(key) or ()), *(f"{name}*" for name in names)]}
    return {**config, INNER: left} if INNER in config else left


def _scale_bytes(config: Config, _itemsize: int) -> dict[int, float]:
    """Those of groups take a byte, FP8's four."""
    said = sorted((ALGORITHMS[name][0], FP8_SCALES.get(name, 1.0)) for name in _algorithms(config))
    return dict(said)  # of several with as many bits, the largest


@storage_format(METHOD, written=False)
def modelopt() -> Format:
    """FP8 and FP4 as NVIDIA publishes models in them."""
    return Format(
        layouts=(Nvfp4Weight, Mxfp4Pair, Fp8Weight, ElementWeight),
        described="modelopt (NVFP4, MXFP4, FP8, MXFP8)",
        unreadable=_unreadable,
        grids=_grids,
        leave_out=_leave_out,
        scale_bytes=_scale_bytes,
        foreign=("pre_quant_scale",),
        loaders=Loaders(
            transformers=lambda _: (False, "it knows no ModelOpt format: use moe_compress.load, or vLLM"),
            vllm=lambda _: (True, "not tried: by its ModelOpt loaders (a GPU)"),
            llama_cpp=lambda _: (True, "not tried: by convert_hf_to_gguf.py of a version that knows ModelOpt"),
            card="stock transformers does not load them",
        ),
    )
