"""DeepSeek-V4 as it is published: FP8 beside FP4 experts, read as stock transformers reads it, and cut."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import moe_compress
from moe_compress.checkpoints.formats.fp8 import Fp4BesideScale, Fp8BesideScale
from moe_compress.checkpoints.reader import open_checkpoint
from support import published
from support.checkpoints import streamed
from support.editing import logits_of

FAMILY, FORMATS = "deepseek_v4", tuple(published.ALONE)
pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """format -> a tiny model in it."""
    place = tmp_path_factory.mktemp("v4")

    @functools.cache
    def make(format):
        published.publish(FAMILY, format, place / format)
        return place / format

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_what_stock_transformers_reads(format, folder):
    said = FineGrainedFP8Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder(format), quantization_config=said).float().eval()
    ours = streamed(open_checkpoint(folder(format)))
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(logits_of(ours), logits_of(stock))
    assert torch.equal(logits_of(moe_compress.load(folder(format), torch.float32)), logits_of(stock))


def test_blocks_at_the_edges_are_cut_off_and_tensors_called_scale_are_no_others():
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(24, 40, generator=generator)
    parts, number_OI = published.fp8_powers(weight_OI, "scale")
    assert parts["scale"].shape == (2, 3)
    assert torch.equal(Fp8BesideScale(parts["scale"], parts["weight"], block=(16, 16))[...], number_OI)
    parts, number_OI = published.fp4_experts(torch.randn(5, 64, generator=generator), "scale")
    assert torch.equal(Fp4BesideScale(parts["scale"], parts["weight"])[...], number_OI)
    for layout in (Fp8BesideScale, Fp4BesideScale):
        assert not layout.reads({".scale": "F32"}) and not layout.reads({".scale": "F32", ".weight": "BF16"})
