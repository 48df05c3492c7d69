"""What a whole model takes in memory is known before it is loaded, whatever it is stored in."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_compress.checkpoints import load
from moe_compress.checkpoints.load import load_as_run, memory_bytes, require_memory
from moe_compress.checkpoints.reader import open_checkpoint
from support import published, readers
from support.slow import slow_after

CPU = torch.device("cpu")
FORMATS = ["fp8 rows", "nvfp4", "int4", "deepseek fp8", "mxfp4", "modelopt fp8", "awq", "gptq", "int4 asymmetric"]


def held(model: torch.nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())


@pytest.mark.parametrize("format", slow_after(4, FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:weights of .* are made dense")
def test_it_is_what_is_held(format, dtype, tmp_path):
    published.publish("mixtral", format, tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    # Shapes beside packed matrices are in files alone.
    assert memory_bytes(opened, dtype, CPU) == pytest.approx(held(load_as_run(opened, dtype, CPU)), rel=0.01)


def test_plain_numbers_of_two_kinds_are_counted_in_the_one_that_they_are_loaded_in(tmp_path):
    readers.save_model("mixtral", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({k: t if ".gate." in k else t.bfloat16() for k, t in load_file(file).items()}, file, {"format": "pt"})
    opened = open_checkpoint(tmp_path / "model")
    assert memory_bytes(opened, torch.bfloat16, CPU) == held(load_as_run(opened, torch.bfloat16, CPU))


def test_what_is_made_dense_is_refused_where_only_its_codes_would_fit(tmp_path, monkeypatch):
    published.publish("mixtral", "fp8 rows", tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    monkeypatch.setattr(load, "free_memory", lambda _: 2 * opened.bytes)
    with pytest.raises(ValueError, match=r"695\.9 KiB as float32 in memory, but cpu has 406\.0 KiB free"):
        require_memory([opened], torch.float32, CPU, "has to be whole")
    require_memory([opened], torch.bfloat16, CPU, "has to be whole")
