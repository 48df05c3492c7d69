"""Tiny models as others publish them: weights packed by the compressed-tensors library, or by the formats' formulas.

Each format has the numbers that its own decoder makes of it beside it. O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import readers

Parts = dict[str, Tensor]
LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
IGNORE = ["lm_head", r"re:.*gate$", r"re:.*kv_b_proj$"]
# DeepSeek-V4's own names: what joins and weighs what is compressed stays plain.
LINEAR_V4 = re.compile(
    r"^(layers|mtp)\.\d+\.(attn\.(w[qo]_[ab]|wkv|indexer\.wq_b)|ffn\.(shared_)?experts\..*w[123])\.weight$"
)
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_MAX, FP4_MAX = 448.0, 6.0


def _groups(weight_OI: Tensor, size: int) -> Tensor:
    return weight_OI.float().unflatten(-1, (-1, size))


def _largest_of_blocks(weight_OI: Tensor, rows: int, columns: int) -> Tensor:
    padded = torch.nn.functional.pad(weight_OI, (0, -weight_OI.shape[1] % columns, 0, -weight_OI.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3))


# --- compressed-tensors: the library packs, and unpacks ----------------------------------------------------------


def _scales(weight_OI: Tensor, args: QuantizationArgs) -> Parts:
    """Scales (and zero points) as a recipe of llm-compressor would find them: by the largest weight."""
    most = {8: FP8_MAX, 4: FP4_MAX}[args.num_bits] if args.type == "float" else 2.0 ** (args.num_bits - 1) - 0.5
    strategy = next(word for word in ("tensor", "channel", "group", "block", "tensor_group") if args.strategy == word)
    if strategy == "block":
        return {"weight_scale": (_largest_of_blocks(weight_OI, *args.block_structure) / FP8_MAX).bfloat16()}
    grouped = {"tensor": weight_OI.reshape(1, 1, -1), "channel": weight_OI.unsqueeze(1)}.get(strategy)
    grouped = _groups(weight_OI, args.group_size or 1) if grouped is None else grouped
    if not args.symmetric:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale, half = ((high - low) / (2.0**args.num_bits - 1)).bfloat16(), 2 ** (args.num_bits - 1)
        return {"weight_scale": scale, "weight_zero_point": (-half - low / scale).round().to(torch.int8)}
    scale = grouped.abs().amax(-1) / most
    if strategy == "tensor_group":
        divisor = FP8_MAX * FP4_MAX / weight_OI.abs().max()
        return {
            "weight_scale": (scale * divisor).to(torch.float8_e4m3fn).float(),
            "weight_global_scale": divisor.reshape(1),
        }
    if args.scale_dtype == torch.uint8:
        scale = scale.log2().ceil().exp2()
    return {"weight_scale": scale.bfloat16().reshape(1) if strategy == "tensor" else scale.bfloat16()}


def library(
    format: str, inputs: dict[str, Any] | None = None, **weights: Any
) -> tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]:
    """A config of llm-compressor's kind, and what packs a matrix: the tensors, and the numbers they stand for.

    inputs: how they are rounded by a number found beforehand, which is stored as well.
    """
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=format)
    compressor = BaseCompressor.get_value_from_registry(format)

    def packed(weight_OI: Tensor) -> tuple[Parts, Tensor]:
        state = {"weight": weight_OI.float(), **_scales(weight_OI.float(), scheme.weights)}
        parts = compressor.compress(state, scheme)
        number = compressor.decompress(dict(parts), scheme)["weight"]
        return parts | ({"input_scale": torch.tensor([0.5]).bfloat16()} if inputs else {}), number

    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": format}
    group |= {"input_activations": inputs} if inputs else {}
    config = {"quant_method": "compressed-tensors", "format": format, "ignore": IGNORE}
    return {**config, "quantization_status": "compressed", "config_groups": {"group_0": group}}, packed


# --- others: by their formulas -----------------------------------------------------------------------------------


def _fp4(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Octets of the nearest codes, and their numbers."""
    nearest = scaled.abs().unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
    code = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, LEVELS[nearest] * scaled.sign()


def modelopt_nvfp4(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """`weight`, `weight_scale`, `weight_scale_2` and `input_scale`."""
    factor = weight_OI.abs().max().float() / (FP8_MAX * FP4_MAX)
    scale_OG = (_groups(weight_OI, 16).abs().amax(-1) / FP4_MAX / factor).to(torch.float8_e4m3fn)
    real_OG = scale_OG.float() * factor
    octets, number = _fp4((_groups(weight_OI, 16) / real_OG.clamp_min(1e-9).unsqueeze(-1)).flatten(-2))
    parts = {"weight": octets, "weight_scale": scale_OG, "weight_scale_2": factor, "input_scale": torch.tensor(0.5)}
    return parts, (number.unflatten(-1, (-1, 16)) * real_OG.unsqueeze(-1)).flatten(-2)


def modelopt_fp8(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """`weight` and one number for it; inputs are rounded by a number found beforehand."""
    scale = weight_OI.abs().max().float() / FP8_MAX
    codes = (weight_OI.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def modelopt_fp8_rows(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """`weight` and a number for every output, in a list."""
    scale_O = weight_OI.abs().amax(1).float() / FP8_MAX
    codes = (weight_OI.float() / scale_O[:, None]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale_O}, codes.float() * scale_O[:, None]


def modelopt_mxfp4(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """`weight` of two codes a byte, `weight_scale` of exponents, and inputs' scale: they are rounded to FP8."""
    exponent_OG = (_groups(weight_OI, 32).abs().amax(-1) / FP4_MAX).log2().ceil()
    real_OG1 = exponent_OG.exp2().unsqueeze(-1)
    octets, number = _fp4((_groups(weight_OI, 32) / real_OG1).flatten(-2))
    parts = {"weight": octets, "weight_scale": (exponent_OG + 127).to(torch.uint8), "input_scale": torch.tensor(0.5)}
    return parts, (number.unflatten(-1, (-1, 32)) * real_OG1).flatten(-2)


def fp8_blocks(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """DeepSeek-V3's: `weight` and a factor for every block of 16 x 16, those at the edges cut off."""
    factor = _largest_of_blocks(weight_OI.float(), 16, 16) / FP8_MAX
    spread = factor.repeat_interleave(16, 0).repeat_interleave(16, 1)[: len(weight_OI), : weight_OI.shape[1]]
    codes = (weight_OI.float() / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": factor}, codes.float() * spread


def _power_of_two(largest: Tensor, most: float) -> Tensor:
    """The least by which a number may be divided so that it is not above the most."""
    return (largest.float() / most).log2().ceil().exp2()


def fp8_powers(weight_OI: Tensor, end: str) -> tuple[Parts, Tensor]:
    """DeepSeek-V4's: `weight` and a power of two for every block of 16 x 16, in a byte."""
    factor = _power_of_two(_largest_of_blocks(weight_OI.float(), 16, 16), FP8_MAX)
    spread = factor.repeat_interleave(16, 0).repeat_interleave(16, 1)[: len(weight_OI), : weight_OI.shape[1]]
    codes = (weight_OI.float() / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, end: factor.to(torch.float8_e8m0fnu)}, codes.float() * spread


def fp4_experts(weight_OI: Tensor, end: str) -> tuple[Parts, Tensor]:
    """DeepSeek-V4's experts: `weight` of two codes a byte, as int8, and a power of two for 32 inputs, in a byte."""
    factor_OG = _power_of_two(_groups(weight_OI, 32).abs().amax(-1), FP4_MAX)
    octets, number = _fp4((_groups(weight_OI, 32) / factor_OG.unsqueeze(-1)).flatten(-2))
    parts = {"weight": octets.view(torch.int8), end: factor_OG.to(torch.float8_e8m0fnu)}
    return parts, (number.unflatten(-1, (-1, 32)) * factor_OG.unsqueeze(-1)).flatten(-2)


def fp8_static(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """Mistral's: `weight`, one factor for it and one for its inputs."""
    factor = weight_OI.abs().max().float() / FP8_MAX
    codes = (weight_OI.float() / factor).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": factor, "activation_scale": torch.tensor(0.5)}, codes.float() * factor


def _asymmetric(weight_OI: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [O, I], scales fp16 and zero points [O, G]."""
    grouped = _groups(weight_OI, size)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale_OG = ((high - low) / 15).half()
    zero_OG = (-low / scale_OG.float()).round().clamp(1, 15)
    codes = (grouped / scale_OG.float().unsqueeze(-1) + zero_OG.unsqueeze(-1)).round().clamp(0, 15)
    return codes.flatten(-2).int(), scale_OG, zero_OG.int()


def _words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight codes a word, along the last dimension, the first of `order` in the low bits."""
    parts = codes.unflatten(-1, (-1, 8)).long()
    word = sum(parts[..., column] << 4 * place for place, column in enumerate(order))
    return torch.where(word >= 2**31, word - 2**32, word).int().contiguous()


def awq(weight_OI: Tensor) -> tuple[Parts, Tensor]:
    """AWQ's GEMM: packed along the outputs, neighbours interleaved."""
    codes_OI, scale_OG, zero_OG = _asymmetric(weight_OI, 16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": _words(codes_OI.T, order),
        "qzeros": _words(zero_OG.T, order),
        "scales": scale_OG.T.contiguous(),
    }
    number = (codes_OI.unflatten(-1, (-1, 16)) - zero_OG.unsqueeze(-1)).half() * scale_OG.unsqueeze(-1)
    return parts, number.flatten(-2)


def gptq(weight_OI: Tensor, act_order: bool = False, less: int = 1) -> tuple[Parts, Tensor]:
    """GPTQ's: packed along the inputs, zero points `less` than they are, the group of every input beside them."""
    inputs = weight_OI.shape[1]
    order_I = torch.randperm(inputs, generator=torch.Generator().manual_seed(1)) if act_order else torch.arange(inputs)
    codes_OI, scale_OG, zero_OG = _asymmetric(weight_OI[:, order_I], 16)
    index_I = torch.empty(inputs, dtype=torch.int32)
    index_I[order_I] = torch.arange(inputs, dtype=torch.int32) // 16
    codes_OI = codes_OI[:, order_I.argsort()]
    straight = tuple(range(8))
    parts = {
        "qweight": _words(codes_OI, straight).T.contiguous(),
        "qzeros": _words((zero_OG - less).T, straight),
        "scales": scale_OG.T.contiguous(),
        "g_idx": index_I,
    }
    place = index_I.long()
    return parts, (codes_OI - zero_OG[:, place]).half() * scale_OG[:, place]


EIGHT = {"num_bits": 8, "type": "float"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head", "kv_b_proj"]}
GROUP = {"strategy": "group", "group_size": 16}
MODELOPT = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8", "ignore": ["lm_head", "*kv_b_proj"]}
FP4 = {"expert_dtype": "fp4"}
V4 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "dynamic": {"-:.*kv_b_proj$": {}}}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "int4": library("pack-quantized", num_bits=4, **GROUP),
    "int4 asymmetric": library("pack-quantized", num_bits=4, symmetric=False, **GROUP),
    "int3 asymmetric rows": library("pack-quantized", num_bits=3, symmetric=False, strategy="channel"),
    "int8": library("int-quantized", num_bits=8, strategy="channel"),
    "fp8 rows": library("float-quantized", **EIGHT, strategy="channel"),
    "fp8 matrix": library("float-quantized", **EIGHT, strategy="tensor"),
    "fp8 blocks": library("float-quantized", **EIGHT, strategy="block", block_structure=[16, 16]),
    "fp8 static matrix": library(
        "float-quantized", {**EIGHT, "strategy": "tensor", "dynamic": False}, **EIGHT, strategy="tensor"
    ),
    "nvfp4": library("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4": library(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "modelopt nvfp4": ({**MODELOPT, "quant_algo": "NVFP4", "group_size": 16}, modelopt_nvfp4),
    "modelopt fp8": ({**MODELOPT, "quant_algo": "FP8"}, modelopt_fp8),
    "modelopt fp8 rows": ({**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, modelopt_fp8_rows),
    "modelopt mxfp4": ({**MODELOPT, "quant_algo": "W4A8_MXFP4_FP8", "group_size": 32}, modelopt_mxfp4),
    "deepseek fp8": ({**FP8, "activation_scheme": "dynamic", "weight_block_size": [16, 16]}, fp8_blocks),
    "mistral fp8": ({**FP8, "activation_scheme": "static", "weight_block_size": None}, fp8_static),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": ["kv_b_proj"]},
        awq,
    ),
    "gptq": ({**GPTQ, "desc_act": False, "checkpoint_format": "gptq"}, gptq),
    "gptq act-order": (
        {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}, functools.partial(gptq, act_order=True, less=0)
    ),
    "deepseek fp4": ({**V4, "weight_block_size": [16, 16]}, functools.partial(fp8_powers, end="scale")),
    "transformers fp4": (
        {**V4, **FP4, "weight_block_size": [16, 16]}, functools.partial(fp8_powers, end="weight_scale_inv")
    ),
}  # fmt: skip
# Formats of one family alone, with another one for its experts that config.json says apart.
ALONE = {"deepseek fp4": "deepseek_v4", "transformers fp4": "deepseek_v4"}
EXPERTS = {
    "deepseek fp4": functools.partial(fp4_experts, end="scale"),
    "transformers fp4": functools.partial(fp4_experts, end="weight_scale_inv"),
}
# Widths that all groups divide.
WIDE = {"mixtral": {"intermediate_size": 64}, "deepseek_v3": {
    "moe_intermediate_size": 64, "intermediate_size": 64, "q_lora_rank": 32}, "qwen3_moe": {
    "moe_intermediate_size": 64}, "deepseek_v4": {
    "moe_intermediate_size": 64, "q_lora_rank": 32, "o_lora_rank": 16, "index_n_heads": 16}}  # fmt: skip
# Every format with every family that is published in it, as far as tests go.
PAIRS = [(family, format) for family in WIDE for format in FORMATS
         if (family == ALONE[format] if format in ALONE else family not in ALONE.values())]  # fmt: skip


def attention_of(family: str) -> str:
    """What stands in the names of its attention's tensors."""
    return ".attn." if family == "deepseek_v4" else ".self_attn."


def slow_pairs(fast: Callable[[str, str], bool]) -> list[ParameterSet]:
    """All pairs, slow where `fast` does not say so of family and format."""
    return [pytest.param(*pair, marks=() if fast(*pair) else pytest.mark.slow) for pair in PAIRS]


def publish(family: str, format: str, folder: Path, **sizes: int) -> dict[str, Tensor]:
    """A tiny model whose linear maps but a few are in this format; the numbers that they stand for, by name."""
    readers.save_model(family, folder, **{**WIDE[family], **sizes})
    config, pack = FORMATS[format]
    found: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not (LINEAR_V4 if format in ALONE else LINEAR).search(name) or "kv_b_proj" in name:
            found[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        parts, numbers[name] = EXPERTS[format](tensor) if format in EXPERTS and ".experts." in name else pack(tensor)
        found |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
    if config["quant_method"] == "modelopt":  # an export has scales of a cache of keys and values, which nothing reads
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in numbers}
        found |= {f"model.layers.{i}.self_attn.k_proj.k_scale": torch.tensor(0.5 + i) for i in layers}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if config["quant_method"] == "modelopt" and config["quant_algo"] == "NVFP4":  # as its older versions export
        inner = {"exclude_modules" if key == "ignore" else key: value for key, value in config.items()}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    else:
        values |= {"quantization_config": config, **(FP4 if format in EXPERTS else {})}
    (folder / "config.json").write_text(json.dumps(values))
    return numbers


def publish_both(family: str, format: str, place: Path, **sizes: int) -> tuple[Path, Path]:
    """Folders of a tiny model in this format, and of a copy of its numbers in fp32."""
    packed, dense = place / f"{family} {format}", place / f"{family} {format} dense"
    numbers = publish(family, format, packed, **sizes)
    dense.mkdir()
    for path in packed.iterdir():
        if path.suffix != ".safetensors" and path.name != "hf_quant_config.json":
            (dense / path.name).write_bytes(path.read_bytes())
    values = json.loads((dense / "config.json").read_text()) | {"dtype": "float32"}
    values = {key: value for key, value in values.items() if key not in ("quantization_config", *FP4)}
    (dense / "config.json").write_text(json.dumps(values))
    plain = {name: t for name, t in load_file(packed / "model.safetensors").items() if _is_plain(name, numbers)}
    found = {n: t.float() if t.is_floating_point() else t for n, t in {**plain, **numbers}.items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, dense / "model.safetensors")
    return packed, dense


def _is_plain(name: str, numbers: Parts) -> bool:
    """Whether a tensor is no part of a packed matrix."""
    return f"{name.rpartition('.')[0]}.weight" not in numbers and not name.endswith("k_scale")
