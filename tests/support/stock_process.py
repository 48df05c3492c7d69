"""A fresh Python process that finds nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from support import tiny


def generated(model: PreTrainedModel) -> Tensor:
    """A few greedy tokens behind a text that is longer than the tiny sliding windows."""
    return model.generate(tiny.token_ids(2, 18), max_new_tokens=3, min_new_tokens=3, do_sample=False)


STRANGER = """
import json, sys
sys.modules["moe_compress"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folders, expected = json.loads(sys.argv[1]), load_file(sys.argv[2])
ids, prompt = map(torch.tensor, json.loads(sys.argv[3]))
for name, folder in folders.items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), (name, info)
    for parameter in model.parameters():  # to where memory is aligned, which the last bits of products depend on
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
    assert torch.equal(logits, expected[name]), (name, float((logits - expected[name]).abs().max()))
    made = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(made, expected[name + " generated"]), name
print(len(folders))
"""


def stranger(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python process that finds nothing of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment = {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=home.parent, capture_output=True, text=True, check=False
    )
