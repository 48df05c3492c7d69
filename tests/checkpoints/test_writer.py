"""Names and bytes are written back as they were, on every family, one layer a shard."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.checkpoints.safetensors_file import read_regions, write_shard
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.surgery import rewrite
from moe_compress.models import hf
from moe_compress.utils.hashing import tensor_bytes
from support import tiny
from support.editing import write
from support.identity import rewritten
from support.slow import DIFFERENT, slow_unless


@pytest.mark.parametrize(
    ("family", "dtype"),
    slow_unless(
        lambda family, dtype: family in DIFFERENT and (dtype == torch.bfloat16 or family == "mixtral"),
        tiny.CONFIGS,
        [torch.float32, torch.bfloat16],
    ),
)
def test_identity_writes_the_same_names_and_bytes(family, dtype, tmp_path):
    source = open_checkpoint(tiny.save(tiny.make(family), tmp_path / "source", dtype))
    for written in (rewritten(source, tmp_path / "through the model"), write(source, [], tmp_path / "copied")):
        assert written.tensors.keys() == source.tensors.keys()
        with source.read(source.tensors) as before, written.read(written.tensors) as after:
            for name in before:
                a, b = before[name][...], after[name][...]
                assert a.dtype == b.dtype and torch.equal(a, b), name
        _, info = AutoModelForCausalLM.from_pretrained(written.folder, output_loading_info=True)
        assert not any(info.values()), info


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(8.0, dtype=torch.float64)[4:5].as_strided((1,), (4,)),
        torch.arange(6.0).view(3, 2)[1:2, 1],
        torch.tensor(3.0),
        torch.arange(6).view(2, 3).t(),
        torch.empty(0, 3),
        torch.tensor([True, False]),
    ],
    ids=["stride of one element", "column of one row", "scalar", "transposed", "empty", "bool"],
)
def test_tensors_lie_in_shards_as_they_are(tensor, tmp_path):
    write_shard(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)
    assert tensor_bytes(tensor) == tensor.numpy().tobytes()


def test_shards_are_one_layer_each(family_checkpoint, tmp_path):
    source = family_checkpoint("mixtral")
    writer = CheckpointWriter(tmp_path / "out", source, "identity")
    rewrite(source, [], writer)
    writer.finish(source.values, {})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == tiny.LAYERS + 1
    for number, file in enumerate(files[1:]):
        assert {hf.layer_of(key) for key in read_regions(file)} == {number}
