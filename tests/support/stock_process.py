"""Python processes that find nothing of ours."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


# Imports once what all strangers import, and is one of them by a copy (fork) for everyone that is asked for.
COPIED = """
import json, os, sys, traceback
import torch, transformers, transformers.dynamic_module_utils as dynamic, transformers.modeling_utils
import transformers.generation, transformers.models.auto.modeling_auto, safetensors.torch
torch.set_num_threads(1)

def become(asked):
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.argv = ["-c", *asked["words"]]
    home = asked["environment"].get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    dynamic.HF_MODULES_CACHE = asked["environment"].get("HF_MODULES_CACHE", home + "/modules")
    try:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if not child:
        status = become(json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _first() -> subprocess.Popen[str]:
    """The process that is copied, for as long as this one lives."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-I", "-c", COPIED]
    started = subprocess.Popen(words, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(started.kill)
    return started


def copied(
    code: str, words: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run code in a copy of a process that has imported stock transformers, and nothing of ours."""
    first = _first()
    assert first.stdin is not None and first.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        said = {name: f"{place}/{name}" for name in ("out", "err")}
        asked = {"code": code, "words": words, "environment": dict(environment), "folder": str(folder), **said}
        print(json.dumps(asked), file=first.stdin, flush=True)
        status = int(first.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8") for file in said.values())
    return subprocess.CompletedProcess(words, status, out, err)


def run_copied(code: str, words: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `run_isolated` does, without waiting for imports."""
    return copied(code, words, {**os.environ, **variables}, Path.cwd())


def stranger(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A Python process that finds nothing of ours, given code (-c) or a module (-m)."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment = {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if words[0] == "-c":
        return copied(words[1], words[2:], environment, home.parent)
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=home.parent, capture_output=True, text=True, check=False
    )
