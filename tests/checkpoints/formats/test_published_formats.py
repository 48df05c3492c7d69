"""Formats that models are published in are decoded as their own decoders do, and trimmed as bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from support import published
from support.editing import logits_of
from support.pruned import stored
from support.slow import each_once

pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")
Published = Callable[[str, str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="session")
def made_by(tmp_path_factory) -> Published:
    """(family, format) -> a tiny model in it, and the numbers that it stands for."""
    place = tmp_path_factory.mktemp("published")

    @functools.cache
    def make(family: str, format: str) -> tuple[Path, dict[str, Tensor]]:
        folder = place / f"{family} {format}"
        return folder, published.publish(family, format, folder)

    return make


OFTEN = [family for family in published.WIDE if family not in published.ALONE.values()]
ONCE = each_once(OFTEN, [format for format in published.FORMATS if format not in published.ALONE])
CASES = published.slow_pairs(lambda family, format: format in published.ALONE or ONCE(family, format))


@pytest.mark.parametrize(("family", "format"), CASES)
def test_numbers_are_those_of_its_own_decoder(family, format, made_by):
    folder, numbers = made_by(family, format)
    checkpoint = open_checkpoint(folder)
    assert len(numbers) > 20 and not [
        name for name in checkpoint.tensors if name.endswith((".scale", "weight_scale", "packed", "g_idx"))
    ]
    with checkpoint.read(numbers) as tensors:
        for name, expected in numbers.items():
            found = tensors[name][...]
            assert torch.equal(found.to(expected), expected), name


TRIMMED = {("deepseek_v3", "int4 asymmetric"), ("mixtral", "modelopt nvfp4"), ("qwen3_moe", "awq"),
           ("deepseek_v4", "deepseek fp4")}  # fmt: skip


@pytest.mark.parametrize(("family", "format"), published.slow_pairs(lambda *case: case in TRIMMED))
def test_trimming_moves_its_bytes(family, format, made_by, options):
    folder, _ = made_by(family, format)
    result = moe_compress.compress("expert_drop score=weight_norm keep=6", model=str(folder), eval=False, **options)
    before, after = stored(folder), stored(result.folder)
    known = {
        t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in before.items() if "gate.w" not in n
    }
    experts = {n: t for n, t in after.items() if ".experts." in n}
    assert all(t.contiguous().flatten().view(torch.uint8).numpy().tobytes() in known for t in experts.values())
    # DeepSeek-V4's first layer looks its experts up: all of them stay.
    left = [6 if family != "deepseek_v4" or "layers.0." not in name else 8 for name in before if ".experts." in name]
    assert len(experts) * 8 == sum(left)
    assert {n: t for n, t in before.items() if n.endswith("k_scale")} == {
        n: t for n, t in after.items() if n.endswith("k_scale")
    }
    config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == published.FORMATS[format][0]["quant_method"]
    assert logits_of(moe_compress.load(result.folder, torch.float32)).isfinite().all()
    found = moe_compress.plan("expert_drop keep=6", model=str(folder))
    # GPTQ's list of groups is as long as a matrix is wide, which counts beside matrices as small as these.
    assert found.before.bytes == pytest.approx(open_checkpoint(folder).bytes, rel=0.12 if "gptq" in format else 0.05)
