"""Packed weights as others decode them: compressed-tensors by its library, the rest by what their kernels compute.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from torch import Tensor, nn

from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.models.matrices import stored_matrices
from support.checkpoints import streamed
from support.editing import logits_of
from support.pruned import stored

# How the names of the tensors end that a packed matrix is known by.
SIGNS = (".weight_scale", ".weight_scale_inv", ".qweight")


def decoded(folder: Path) -> dict[str, Tensor]:
    """The numbers of all packed matrices of a checkpoint, by the names of their weights."""
    config, tensors = json.loads((folder / "config.json").read_text())["quantization_config"], stored(folder)
    decode = {"compressed-tensors": by_library, "awq": awq, "gptq": gptq, "fp8": fp8}[config["quant_method"]]
    stems = {name.removesuffix(sign) for name in tensors for sign in SIGNS if name.endswith(sign)}
    parts = {stem: {k.removeprefix(f"{stem}."): t for k, t in tensors.items() if k.startswith(f"{stem}.")}
             for stem in sorted(stems)}  # fmt: skip
    names = module_names(folder)
    return {f"{stem}.weight": decode(found, config, names.get(stem, stem)) for stem, found in parts.items()}


def module_names(folder: Path) -> dict[str, str]:
    """What linear maps beside experts are called in the model, by what their tensors' names begin with."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.skeleton(torch.float32)
    places = [(i, stored_matrices(model, i)) for i in range(checkpoint.num_layers)]
    return {
        stored.removesuffix(".weight"): f"layers.{i}.{name}"
        for i, found in places
        for stored, (name, _) in found.items()
        if ".experts." not in name
    }


def by_library(parts: dict[str, Tensor], config: dict[str, Any], name: str) -> Tensor:
    """By the group that the library takes for a linear map of this name."""
    linear, groups = nn.Linear(1, 1), QuantizationConfig.model_validate(config).config_groups
    assert not is_match(name, linear, config["ignore"]), name
    first = match_targets(name, linear, [target for group in groups.values() for target in group.targets])[0]
    scheme = next(group for group in groups.values() if first in group.targets)
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format or config["format"]))
    return compressor.decompress(parts, scheme)["weight"].float()


def awq(parts: dict[str, Tensor], config: dict[str, Any], _name: str) -> Tensor:
    """As AutoAWQ undoes its GEMM packing: nibbles from the low bits up, then the neighbours put back in order."""
    shifts, order = torch.arange(0, 32, 4), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def codes(words: Tensor) -> Tensor:
        nibbles = words.unsqueeze(-1) >> shifts & 15
        return nibbles[..., order].flatten(-2).float()

    inputs = parts["qweight"].shape[0]
    group_I = torch.arange(inputs) // (inputs if config["group_size"] < 0 else config["group_size"])
    number_IO = (codes(parts["qweight"]) - codes(parts["qzeros"])[group_I]) * parts["scales"].float()[group_I]
    return number_IO.T


def gptq(parts: dict[str, Tensor], config: dict[str, Any], _name: str) -> Tensor:
    """As GPTQ's kernels unpack 4 bits: along the inputs, zero points one less than they are."""
    assert config["bits"] == 4 and config["checkpoint_format"] == "gptq"
    shifts, group_I = torch.arange(0, 32, 4), parts["g_idx"].long()
    code_IO = (parts["qweight"].unsqueeze(1) >> shifts[:, None] & 15).flatten(0, 1)
    zero_GO = (parts["qzeros"].unsqueeze(-1) >> shifts & 15).flatten(-2) + 1
    return ((code_IO - zero_GO[group_I]) * parts["scales"].float()[group_I]).T


def fp8(parts: dict[str, Tensor], config: dict[str, Any], _name: str) -> Tensor:
    """As DeepSeek-V3's `weight_dequant`: every number times the factor of its block."""
    (rows, columns), codes = config["weight_block_size"], parts["weight"].float()
    block_OI = torch.arange(len(codes))[:, None] // rows, torch.arange(codes.shape[1])[None] // columns
    return codes * parts["weight_scale_inv"][block_OI]


def stock_reads_the_same(folder: Path) -> bool:
    """Whether stock transformers reads what we do, but for scales that it rounds to the dtype that is published."""
    try:
        model = load_model(folder, torch.bfloat16)
        logits_of(model)  # it makes some maps dense as they are used
    except (ValueError, RuntimeError, ImportError):
        return False
    theirs, ours = dict(model.named_parameters()), streamed(open_checkpoint(folder)).named_parameters()
    return all(float((theirs[name] - each).norm()) <= 0.01 * float(each.norm()) for name, each in ours)
