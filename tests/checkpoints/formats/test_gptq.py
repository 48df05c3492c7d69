"""GPTQ's layout is what other readers expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.methods.quantization.grid import BITS
from moe_compress.models.moe import moe_views
from support import naive_quantization as slow
from support import tiny
from support.editing import logits_of
from support.slow import each_once, slow_unless

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


GPTQ_FAMILIES = ("mixtral", "deepseek_v3", "qwen2_moe", "nemotron_h")


@pytest.mark.parametrize(("family", "bits"), slow_unless(each_once(GPTQ_FAMILIES, BITS), GPTQ_FAMILIES, BITS))
def test_gptq_layout_is_what_other_readers_expect(family, bits, made):
    folder = made(family, f"quantize method=rtn group_size=8 clip=max bits={bits} format=gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 8, True, False)
    tensors = {k: t for path in folder.glob("model*.safetensors") for k, t in load_file(path).items()}
    checkpoint = open_checkpoint(folder)
    assert checkpoint.packed
    for name in checkpoint.packed[:6]:
        stem = name.removesuffix(".weight")
        words, zeros, scales, index = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        inputs, outputs = len(index), scales.shape[1]
        codes = slow.unpack(words.T.contiguous(), bits, inputs)  # offset by half of the range
        stored = slow.unpack(zeros, bits, outputs) + (1 << (bits - 1))
        assert torch.equal(stored, torch.full_like(stored, (1 << (bits - 1)) - 1))
        expected = codes.double() * scales.T.double()[:, index.long()]
        with checkpoint.read([name]) as read:
            torch.testing.assert_close(read[name][...].double(), expected, rtol=2e-3, atol=1e-6)


def test_gptq_layout_reads_and_trims_like_the_others(made):
    first = "quantize method=rtn group_size=8 clip=max bits=4 format=gptq"
    folder = made("mixtral", f"{first} + expert_drop score=weight_norm keep=6")
    assert len(open_checkpoint(folder).packed) == 3 * 6 * tiny.LAYERS
    assert bool(logits_of(moe_compress.load(folder, torch.float32)).isfinite().all())
    assert {view.num_experts for view in moe_views(moe_compress.load(folder)).values()} == {6}


def test_files_from_before_there_was_a_checkpoint_format_are_read(made, tmp_path):
    """There was one layout when quantizers did not name it yet."""
    source = made("mixtral", "quantize method=rtn group_size=8 clip=max bits=4 format=gptq")
    folder = Path(shutil.copytree(source, tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checkpoint_format"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(moe_compress.load(folder)), logits_of(moe_compress.load(source)))
    config["quantization_config"]["checkpoint_format"] = "gptq_v3"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not read with checkpoint_format=gptq_v3"):
        open_checkpoint(folder)
