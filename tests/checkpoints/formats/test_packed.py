"""Packed checkpoints that are damaged or of other formats are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from support.pruned import stored
from support.quantized import BLIND

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")

GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq"}
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": True}
TARGETS = {"targets": ["re:.*experts.*"]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
PACKED |= {"config_groups": {"experts": {**TARGETS, "weights": GROUP}}}


def grouped(**change: Any) -> dict[str, Any]:
    return {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, **change}}}}


CONFIGS: list[Any] = [
    ({**GPTQ, "sym": None}, {}, "is stored in gptq format, which is not read with sym=None: use a bf16 or fp32 copy"),
    ({**GPTQ, "desc_act": "yes"}, {}, "is stored in gptq format, which is not read with desc_act=yes"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, {}, "is stored in fp8 format, which is not read"),
    ({"quant_method": "awq", "bits": 8}, {}, "is stored in awq format, which is not read with bits=8"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, {}, "which is not read with quant_algo=W4A8_AWQ"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, {}, "whose quantized_layers are missing"),
    ({**PACKED, "format": "float-quantized"}, {}, "is stored in compressed-tensors float-quantized format, which is"),
    ({**PACKED, "config_groups": {}}, {}, "whose config_groups are missing"),
    (
        {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, "num_bits": None}}}},
        {},
        "group 'a' lacks num_bits",
    ),
    ({**PACKED, "ignore": ["re:("]}, {}, "whose settings say nothing that is known"),
    (
        {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, "group_size": None}}}},
        {},
        "no strategy and gro",
    ),
    ({**GPTQ, "sym": True, "group_size": 8, "dynamic": {"+:.*": {"bits": 8}}}, {}, "settings of their own for +:.*"),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"model.layers.0.it.pre_quant_scale": torch.zeros(1)},
        "model.layers.0.it is packed with pre_quant_scale, which is not read: use a bf16 copy",
    ),
    (PACKED, {"model.layers.0.it.weight_packed": torch.zeros(1)}, "weight_scale is missing beside model.layers.0.it"),
]


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint in one file, after a change of its tensors or its config."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors, values = dict(stored(folder)), json.loads((folder / "config.json").read_text())
    change(tensors, values)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(values))
    return out


def _ending(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def _other_groups(tensors, _values):
    tensors[_ending(tensors, ".weight_scale")] = tensors[_ending(tensors, ".weight_scale")][:, :1]


def _other_bits(_tensors, values):
    values["quantization_config"]["config_groups"]["experts"]["weights"]["num_bits"] = 8


def _nothing_said(_tensors, values):
    del values["quantization_config"]


def _nan(tensors, _values):
    tensors[_ending(tensors, ".weight_scale")][0, 0] = torch.nan


def _zero_points(tensors, _values):
    tensors[_ending(tensors, ".qzeros")][0, 0] = 0


def _order(tensors, _values):
    index = tensors[_ending(tensors, ".g_idx")]
    index[0] = index[-1]


def _no_edits(_tensors, values):
    del values["moe_compress"]["edits"]


DAMAGES: list[Any] = [
    ("", _other_groups, "has scales .* as config.json says"),
    ("", _other_bits, "that is not 8 bits in groups of 8"),
    ("", _nothing_said, "is packed, but config.json has no quantization_config"),
    ("", _nan, "NaN or infinity"),
    ("format=gptq", _zero_points, "has zero points"),
    ("format=gptq", _order, "order of their own"),
    ("format=packed", _no_edits, "moe_compress lacks edits"),
]


@pytest.mark.parametrize(("words", "change", "said"), DAMAGES)
def test_damaged_checkpoints_are_refused(words, change, said, wide_made, tmp_path):
    folder = damaged(wide_made("mixtral", f"{BLIND} {words}"), tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=said):
        moe_compress.load(folder)


@pytest.mark.parametrize(("config", "more", "said"), CONFIGS)
def test_other_formats_are_not_read(config, more, said, wide_lab, tmp_path):
    model = Path(str(wide_lab("mixtral")["model"]))
    values = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    save_file({**stored(model), **more}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(said)):
        open_checkpoint(tmp_path)
