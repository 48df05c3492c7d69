"""Devices, dtypes and kernels that are not there."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from support.slow import slow_after


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(reader_folder, refused):
    assert "torch sees no GPU: use device=cpu" in refused(model=reader_folder("mixtral"), device="cuda")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    slow_after(
        1,
        [
            ("device", "gpu", "device=gpu is not a device: use auto, cpu or cuda[:N]."),
            ("device", "meta", "device=meta is not supported: use auto, cpu or cuda[:N]."),
            ("dtype", "float23", "unknown dtype 'float23': did you mean"),
            ("attn", "flash_attention_2", "attn=flash_attention_2 is not available here"),
            ("attn", "nonsense", "is not supported. The only possible arguments are"),
        ],
    ),
)
def test_arithmetic_that_is_not_there(key, value, said, reader_folder, refused):
    assert said in refused(model=reader_folder("mixtral"), **{key: value})
    with pytest.raises(ValueError) as caught:
        moe_compress.evaluate(reader_folder("mixtral"), **{key: value, "eval_data": "zoo"})
    assert said in str(caught.value)
