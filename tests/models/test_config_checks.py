"""config.json values that describe no model are refused in a sentence, before anything is built of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compress
from moe_compress import zoo
from moe_compress.models import hf
from moe_compress.utils.files import read_json
from support import wrappers

BASE = read_json(zoo.path("tiny-mixtral") / "config.json")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 100_000}, "num_hidden_layers=100000: no mixtral model is like that"),
    ({"hidden_size": 10**19}, "hidden_size=10000000000000000000: no mixtral model"),
    ({"num_labels": 10**8}, "num_labels=100000000: no mixtral model"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000: no"),
    ({"intermediate_size": 0}, r"intermediate_size=0: no mixtral model is like that \(1 to"),
    ({"n_shared_experts": 10**7}, "n_shared_experts=10000000: no"),
    ({"num_attention_heads": 3, "num_key_value_heads": 5}, "says 3 attention heads and 5 key-value heads"),
    ({"num_experts_per_tok": -1}, "num_experts_per_tok=-1: no"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9, but there are 8 experts: 1 to 8"),
    ({"n_group": 3}, "8 experts in 3 groups"),
    ({"hidden_act": "swishy"}, r"no function for hidden_act='swishy' \(did you mean 'swish'\?\)"),
    ({"rope_parameters": {"rope_type": "yarnn"}}, r"no function for rope_parameters.rope_type='yarnn' \(did you mean"),
    ({"auto_map": 5}, "auto_map=5, which is no object that names classes"),
    ({"model_type": ["mixtral"]}, r"model_type=\['mixtral'\], which is no name of an architecture"),
    ({"model_type": "moe_compress_mixtral"}, "needs moe_compress, which holds its edits"),
    ({"model_type": "moe_compress_mixtral", "moe_compress": 5}, "moe_compress is no object"),
    ({"sliding_window": 0}, "sliding_window=0, a window of no token"),
    ({"sliding_window": -1}, "sliding_window=-1: no mixtral model"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": -4.0, "rope_theta": 1e4}},
        "factor=-4.0, but a number above",
    ),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf, but a number above 0"),
    ({"transformers_weights": "other.safetensors"}, "weights of other names are not read"),
    ({"attn_implementation": "evil/kernel"}, "no checkpoint chooses what code is fetched"),
    ({"architectures": [5]}, "not all of them are names of classes"),
    ({"id2label": {str(i): str(i) for i in range(20_000)}}, "names 20000 labels"),
    ({"num_hidden_layers": 1000, "num_local_experts": 30_000}, "says 1000 layers of 30000 experts"),
    ({"rope_theta": float("nan")}, "rope_theta=NaN, which is no number"),
    ({"num_hidden_layers": "3"}, "is no mixtral config: .*'num_hidden_layers' expected int"),
    ({"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers=1000000: no"),
    (
        {"quantization_config": {**FP8, "modules_to_not_convert": 5}},
        "in fp8 format, whose settings say nothing",
    ),
    ({"quantization_config": {**FP8, "weight_block_size": [0, 0]}}, r"fp8 format, which is not read \(e4m3 in blocks"),
    (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": [1],
            }
        },
        "pack-quantized format, whose config_groups",
    ),
]


@pytest.mark.parametrize(("values", "said"), CASES)
def test_refused_at_once_in_a_sentence(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **values}))
    begun = time.process_time()
    with pytest.raises(ValueError, match=said) as error:
        moe_compress.plan("expert_drop keep=6", model=tmp_path)
    assert "\n" not in str(error.value)
    assert time.process_time() - begun < 2


def test_words_of_an_architecture_of_its_own_are_no_mistake():
    values = wrappers.config_of("minimax_m3_vl").to_dict()
    assert values["text_config"]["hidden_act"] == "silu"
    values["text_config"]["hidden_act"] = "swigluoai"  # which its modules apply themselves
    try:
        hf.skeleton(hf.config_from(values), torch.bfloat16)
    except ValueError as error:
        assert "no function for text_config.hidden_act='swigluoai'" in str(error)


class Made(TorchDispatchMode):
    """Keeps how large the tensors were that got memory."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not found.is_meta:
            self.largest = max(self.largest, found.numel())
        return found


def test_a_skeleton_takes_no_memory():
    """671 billion parameters, most of them in stacks that its modules make empty; Llama-4's are full of zeros."""
    config = hf.config_from(read_json(Path(str(zoo.config_path("deepseek-ai/DeepSeek-V3")))))
    zeros = wrappers.config_of("llama4", num_local_experts=64, hidden_size=1024, intermediate_size=2048)
    with Made() as made:
        model = hf.skeleton(config, torch.bfloat16)
        hf.skeleton(zeros, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 671_026_404_352
    assert made.largest < 1 << 20


def test_no_buffer_that_a_model_computes_with_is_missing():
    for model_type in wrappers.WRAPPERS:
        model = hf.skeleton(wrappers.config_of(model_type), torch.float32)
        lacking = {name for name, buffer in model.named_buffers() if buffer.is_meta} - model.state_dict().keys()
        assert not lacking, model_type
