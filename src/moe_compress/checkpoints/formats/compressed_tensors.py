"""compressed-tensors: whole codes packed into int32 words along the inputs, one code an element, or two FP4 in a byte.

Written are symmetric packed ones (`pack-quantized`). Experts have one scheme, all other linear maps another: that is as
far as stock loaders tell schemes apart. O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.checkpoints.formats.compressed_schemes import ALIKE, refuses, scheme_config
from moe_compress.checkpoints.formats.element_layouts import ElementWeight, Fp4Weight
from moe_compress.checkpoints.formats.grid import Grid
from moe_compress.checkpoints.formats.registry import (
    CodedMatrix,
    Config,
    Format,
    Loaders,
    Verdict,
    Writer,
    common_bits,
    storage_format,
    vllm_integers,
)
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, transposed
from moe_compress.models.modeling.bit_packing import WORD, dequantized, pack, unpack

# How groups of weights may be stored: the type of their numbers, and bits.
FORMATS: dict[str, tuple[str, tuple[int, ...]]] = {
    "pack-quantized": ("int", tuple(range(2, 9))),
    "int-quantized": ("int", (8,)),
    "naive-quantized": ("int", (8,)),
    "float-quantized": ("float", (8,)),
    "nvfp4-pack-quantized": ("float", (4,)),
    "mxfp4-pack-quantized": ("float", (4,)),
    "mxfp8-quantized": ("float", (8,)),
}
MIXED, NVFP4 = "mixed-precision", "nvfp4-pack-quantized"
UNCONVERTED = {"mxfp4-pack-quantized", "mxfp8-quantized"}
ONE_BYTE = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
GROUPED = ("group", "tensor_group")
STRATEGIES = ("tensor", "channel", "block", *GROUPED)
INSIDE = "re:"


@dataclass(frozen=True, slots=True)
class CompressedTensorsWeight(PackedWeight):
    """`X.weight_packed` int32 [O, W], `X.weight_scale` [O, G] and `X.weight_shape` for `X.weight`.

    With zero points `X.weight_zero_point` [O', G], packed along the outputs; with act-order the group of every input,
    `X.weight_g_idx` [I]. Both are made dense in memory.
    """

    scale: Any
    words: Any
    shape: Any
    zeros: Any = None
    g_idx: Any = None

    NAMES: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight_packed", ".weight_shape")
    OPTIONAL: ClassVar[tuple[str, ...]] = (".weight_zero_point", ".weight_g_idx")
    SIGN: ClassVar[str] = ".weight_packed"

    @property
    def stays_packed(self) -> bool:
        """Where a code and a scale say all."""
        return self.zeros is None and self.g_idx is None

    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """Words int32 [O, W], scales [O, G], bits and inputs."""
        words_OW, inputs = self.words[...], int(self.shape[...][1])
        return words_OW, self.scale[...], self.bits or words_OW.shape[1] * WORD // inputs, inputs

    def __getitem__(self, _everything: Any) -> Tensor:
        """The weights [O, I]."""
        codes_OI, scale_OG, bits = self.codes()
        if self.stays_packed:
            return dequantized(codes_OI, scale_OG)
        groups = scale_OG.shape[1]
        group_I = torch.arange(codes_OI.shape[1]) // (codes_OI.shape[1] // groups)
        if self.g_idx is not None and bool((self.g_idx[...] >= 0).all()):
            group_I = self.g_idx[...].long()
        number_OI = codes_OI.to(scale_OG.dtype)
        if self.zeros is not None:
            zeros_OG = unpack(transposed(self.zeros[...]), bits, len(codes_OI)).T
            number_OI = number_OI - zeros_OG.to(scale_OG.dtype)[:, group_I]
        return number_OI * scale_OG[:, group_I]

    def disagreement(self, grids: Sequence[Grid]) -> str:
        """What of its shapes lies on none of these grids; empty if they fit."""
        scales, words = list(self.scale.shape), list(self.words.shape)
        return "" if on_a_grid(scales, words, grids) else f"has scales {scales} and codes {words}"


def on_a_grid(scales: Sequence[int], words: Sequence[int], grids: Sequence[Grid]) -> bool:
    """Whether scales [O, G] and packed codes [O, W] of these shapes are those of one of the grids."""
    if len(scales) != 2 or len(words) != 2 or scales[0] != words[0]:
        return False
    return any(
        scales[1] == 1 if not grid.group_size else words[1] == math.ceil(scales[1] * grid.group_size * grid.bits / WORD)
        for grid in grids
    )


def packed_parts(matrix: CodedMatrix) -> CompressedTensorsWeight:
    """Words, scales and shape, and zero points where there are any."""
    codes_OI, bits = matrix.codes_OI, matrix.bits
    zeros = None if matrix.zero_OG is None else pack(matrix.zero_OG.T.contiguous(), bits).T.contiguous()
    shape, scale_OG = torch.tensor(codes_OI.shape), matrix.scale_OG.contiguous()
    return CompressedTensorsWeight(scale_OG, pack(codes_OI, bits), shape, zeros, bits=bits)


def _unreadable(config: Config) -> str:
    if config.get("format") not in (*FORMATS, MIXED):
        return "which is not read"
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return "whose config_groups are missing"
    return next((reason for name, group in groups.items() if (reason := _odd(config, name, group))), "")


def _odd(config: Config, name: str, group: Any) -> str:
    """Why a group of weights is not read; empty if it is."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(weights.get("num_bits"), int) or not group.get("targets"):
        return f"whose group {name!r} lacks num_bits or targets"
    kind, widths = FORMATS.get(str(group.get("format") or config.get("format")), ("", ()))
    if weights.get("type", "int") != kind or weights["num_bits"] not in widths:
        return f"which is not read with {weights.get('type', 'int')} of {weights['num_bits']} bits (group {name!r})"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if size is not None and not (type(size) is int and size > 0):
        return f"whose group {name!r} has group_size={size}"
    if strategy not in STRATEGIES or (strategy in GROUPED) != bool(size):
        return f"whose group {name!r} says no strategy and group_size that are read"
    return "" if strategy != "block" or weights.get("block_structure") else f"whose group {name!r} says no block"


def _grids(config: Config) -> list[Grid]:
    """What every group says, without those that `ignore` names."""
    ignore = tuple(config.get("ignore") or ())
    return [
        Grid(
            bits=group["weights"]["num_bits"],
            group_size=group["weights"].get("group_size") or (group["weights"].get("block_structure") or (0, 0))[1],
            targets=tuple(group["targets"]),
            ignore=ignore,
        )
        for group in config["config_groups"].values()
    ]


def _settings(config: Config) -> dict[str, Any]:
    """The width of codes, and blocks that share a scale."""
    blocks = {tuple(b) for g in config["config_groups"].values() if (b := g["weights"].get("block_structure"))}
    return {**common_bits(_grids(config)), "block": blocks.pop() if len(blocks) == 1 else None}


def _whole_codes(config: Config) -> bool:
    """Whether any group is packed whole numbers without zero points and act-order, or INT8 with scales of rows."""
    for group in config["config_groups"].values():
        weights, kind = group["weights"], group.get("format") or config.get("format")
        by_rows = kind == "pack-quantized" or weights.get("strategy") == "channel"
        plain = weights.get("symmetric", True) and not weights.get("actorder")
        if weights.get("type", "int") == "int" and by_rows and plain:
            return True
    return False


def _scale_bytes(config: Config, itemsize: int) -> dict[int, float]:
    """By bits, of the first group with so many."""
    found = dict[int, float]()
    for group in reversed(config["config_groups"].values()):
        each = _scale_of(group, config["format"], itemsize)
        found |= {} if each is None else {group["weights"]["num_bits"]: each}
    return found


def _scale_of(group: Config, format: str, itemsize: int) -> float | None:
    """A byte for FP4's and MXFP8's; others with what a zero point takes, or shared by outputs; None for plain ones."""
    weights = group["weights"]
    if (group.get("format") or format) in ONE_BYTE:
        return 1.0
    if weights["strategy"] == "block":
        return itemsize / float(weights["block_structure"][0])
    if weights["strategy"] == "tensor":
        return 0.0
    return None if weights.get("symmetric", True) else itemsize + weights["num_bits"] / 8


def _leave_out(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """With more names in `ignore`, where experts stand as patterns of all that is inside them."""
    left = [f"{INSIDE}{name}[.].*" if name.endswith("experts") else name for name in names]
    return {**config, "ignore": [*(config.get("ignore") or ()), *left]}


def _joined(before: Config, new: Config) -> dict[str, Any]:
    """The groups of both, the new ones first; a target of both is the new one's."""
    taken = {target for group in new["config_groups"].values() for target in group["targets"]}
    groups = {}
    for name, group in before["config_groups"].items():
        targets = [target for target in group["targets"] if target not in taken]
        if targets:
            said = {**group, "targets": targets, "format": group.get("format") or before["format"]}
            groups[f"before {name}"] = said
    formats = {group["format"] for group in groups.values()} | {new["format"]}
    return {
        **before,
        **new,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "config_groups": {**new["config_groups"], **groups},
        "ignore": [*dict.fromkeys([*(before.get("ignore") or ()), *(new.get("ignore") or ())])],
    }


def _experts_group(config: Config) -> Mapping[str, Any]:
    """The group that stock transformers takes for experts: one that names them, else one of all linear maps."""
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    named = [g for g in groups if any(t.startswith(INSIDE) and "experts" in t for t in g.get("targets") or ())]
    classes = [g for g in groups if any(not t.startswith(INSIDE) for t in g.get("targets") or ())]
    return next(iter([*named, *classes, *groups]), {})


def _transformers(config: Config) -> Verdict:
    """It makes experts of packed whole numbers, FP8 and MXFP4 dense."""
    group, groups = _experts_group(config), (config.get("config_groups") or {}).values()
    kind, instead = group.get("format") or config.get("format"), "use moe_compress.load or vLLM"
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    if not weights.get("symmetric", True):
        return False, f"its loader leaves out the zero points of experts: {instead}"
    if any(not (each.get("weights") or {}).get("symmetric", True) for each in groups):
        return False, f"its loader expects zero points in another shape: {instead}"
    if kind == NVFP4:
        return False, f"its loader leaves out the global scales of experts, without a word: {instead}"
    if kind in ("int-quantized", "naive-quantized"):
        return False, f"its loader fuses no experts of whole numbers that are not packed: {instead}"
    if weights.get("strategy") == "block":
        return False, f"its loader takes one scale for a row or a matrix of an expert, not for blocks: {instead}"
    if inputs and inputs.get("dynamic") is False:
        return False, f"its loader leaves over the scales of experts' inputs: {instead}"
    return True, "with compressed-tensors installed; weights are made dense"


def _vllm(config: Config) -> Verdict:
    """Its fused experts take no zero points."""
    groups = (config.get("config_groups") or {}).values()
    if any(not group["weights"].get("symmetric", True) for group in groups):
        return False, "its fused experts take no zero points in this layout: use format=awq"
    return vllm_integers(sorted({grid.bits for grid in _grids(config)}))


def _llama_cpp(config: Config) -> Verdict:
    """Its converter takes one group, or several that are all NVFP4; packed whole numbers only in groups of inputs."""
    groups = list((config.get("config_groups") or {}).values())
    formats = {str(group.get("format") or config.get("format")) for group in groups}
    if len(groups) > 1 and formats != {NVFP4}:
        return False, f"its converter takes one config group, and here are {len(groups)}: use where=experts"
    if formats & UNCONVERTED:
        return False, f"its converter knows no {', '.join(sorted(formats))}: use format=nvfp4a16, or dense"
    if formats == {"pack-quantized"} and groups[0]["weights"].get("strategy") != "group":
        return False, "its converter takes packed whole numbers with scales of groups, not of rows: use group_size=128"
    how = "of a version that knows NVFP4" if formats == {NVFP4} else "makes the weights dense"
    return True, f"not tried: convert_hf_to_gguf.py {how}"


@storage_format("compressed-tensors")
def compressed_tensors() -> Format:
    """`pack-quantized` of compressed-tensors, symmetric."""
    return Format(
        layouts=(Fp4Weight, CompressedTensorsWeight, ElementWeight),
        described=f"compressed-tensors ({', '.join(FORMATS)})",
        unreadable=_unreadable,
        grids=_grids,
        settings=_settings,
        whole_codes=_whole_codes,
        scale_bytes=_scale_bytes,
        leave_out=_leave_out,
        joined=_joined,
        loaders=Loaders(
            transformers=_transformers,
            vllm=_vllm,
            llama_cpp=_llama_cpp,
        ),
        writer=Writer(
            parts=packed_parts,
            config=scheme_config,
            shared=ALIKE,
            refuses=refuses,
            excepts=True,
        ),
    )
