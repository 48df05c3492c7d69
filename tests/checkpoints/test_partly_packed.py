"""Configs of packed weights follow what becomes of the weights: names of layers, and of what is plain by then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_compress.checkpoints.formats.registry import QUANTIZATION, format_in
from moe_compress.checkpoints.partly_packed import after_edits, packed_kinds, unpacked
from moe_compress.checkpoints.quantization_config import packed_edits
from moe_compress.edits.edits import DropLayer, KeepExperts, MergeExperts
from moe_compress.models import hf
from support import tiny

QUERIES = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
CONFIGS = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "ignore": ["lm_head", *QUERIES, r"re:model\.layers\.1\.mlp\.experts\..*"],
        "config_groups": {"a": {"targets": ["Linear"], "weights": FP8}},
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": QUERIES},
    "modelopt": {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": [*QUERIES, "model.layers.1.mlp*"]},
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "checkpoint_format": "gptq",
        "dynamic": {rf"-:.*layers\.{i}\.self_attn\.q_proj$": {} for i in (0, 1)},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True,
            "modules_to_not_convert": QUERIES},
}  # fmt: skip


@pytest.fixture(scope="module")
def skeleton():
    return hf.skeleton(tiny.make("qwen3_moe").config, torch.bfloat16)


def packed(skeleton: Any, values: dict[str, Any]) -> dict[int, set[str]]:
    """Matrices by layer of which a config says that they are packed."""
    return {edit.layer: set(edit.bits) for edit in packed_edits(skeleton, values)}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_follow_the_layers_numbers(name, skeleton):
    values = {**tiny.make("qwen3_moe").config.to_dict(), QUANTIZATION: CONFIGS[name]}
    assert not any("self_attn.q_proj" in packed(skeleton, values)[layer] for layer in (0, 1))
    after = after_edits(values, skeleton, [DropLayer(0)])
    text = str(after[QUANTIZATION])
    assert "layers.0.self_attn" in text.replace("\\", "") and "layers.1" not in text.replace("\\", "")
    assert CONFIGS[name] == values[QUANTIZATION]  # what was given is as it was


@pytest.mark.parametrize("name", CONFIGS)
def test_what_has_new_numbers_is_left_out(name, skeleton):
    values = {**tiny.make("qwen3_moe").config.to_dict(), QUANTIZATION: CONFIGS[name]}
    experts = tuple(range(tiny.EXPERTS))
    kept = after_edits(values, skeleton, [KeepExperts(0, experts[:4])])
    assert kept == values
    merge = MergeExperts(
        0, (experts[:2], *((e,) for e in experts[2:])), ((0.5, 0.5), *((1.0,) for _ in experts[2:])), "centroid"
    )
    merged = packed(skeleton, after_edits(values, skeleton, [merge]))
    assert "mlp.experts.gate" not in merged[0] and "self_attn.k_proj" in merged[0]
    assert ("mlp.experts.gate" in merged[1]) == ("mlp.experts.gate" in packed(skeleton, values)[1])
    assert QUANTIZATION not in unpacked(values, skeleton, packed(skeleton, values))
    assert packed_kinds(skeleton, values) == {"experts", "attention"}
    assert format_in(after_edits(values, skeleton, [merge])).name == name
