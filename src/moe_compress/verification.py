"""Verifying a checkpoint: loaded by stock transformers in a fresh process, its logits beside ours, and who can load it.

The fresh process cannot import this package: what it loads, anybody can who trusts the code in the checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_compress.checkpoint.load import load_as_run
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.shards import write_shard
from moe_compress.compatibility import Verdict, compatibility
from moe_compress.kept import Kept
from moe_compress.model.packing_config import says_packed
from moe_compress.report.verification import as_markdown
from moe_compress.runtime import read_json

# Relative error of the logits that is a format's own: arithmetic in fp32, scales in 16 bits, codes in a kernel.
TOLERANCE = {"plain": 1e-4, "edited": 1e-4, "packed": 2e-2}
ROWS, LENGTH, NEW_TOKENS = 2, 16, 4
STOCK = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out, trust, tokens = sys.argv[1:6]
load = AutoModelForCausalLM.from_pretrained
model, info = load(folder, dtype=torch.float32, trust_remote_code=trust == "yes", output_loading_info=True)
wrong = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
ids = load_file(ids)["ids"]
with torch.no_grad():
    logits = model.eval()(ids, use_cache=False).logits.float()
    made = model.generate(ids[:1], max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False)
save_file({"logits": logits, "made": made}, out + ".safetensors")
json.dump({"wrong": wrong, "class": type(model).__name__}, open(out + ".json", "w"))
"""


@dataclass(frozen=True)
class Verification(Kept):
    """What a fresh stock process made of a checkpoint; `problems` is empty where all is well."""

    model: str
    form: str
    stock_class: str | None
    error: float | None
    tolerance: float
    problems: list[str]
    clients: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "passed": self.passed}

    def markdown(self) -> str:
        """The verdict, and who can load the checkpoint."""
        return as_markdown(self.to_json())


def verify(checkpoint: Checkpoint) -> Verification:
    """Load, compare and generate; one fresh process, and the same checkpoint in this one."""
    form, clients = form_of(checkpoint), compatibility(checkpoint)
    stock = next(verdict for verdict in clients if verdict.client == "transformers")
    found, problems = {}, []
    if stock.loads:
        try:
            found = _in_fresh_process(checkpoint, form)
        except ValueError as error:
            problems.append(str(error))
    wrong, distance = found.get("wrong") or {}, None
    problems += [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items()]
    if found:
        ours = _ours(checkpoint)
        distance = float((found["logits"] - ours).norm() / ours.norm())
        if not distance <= TOLERANCE[form]:
            problems.append(f"logits differ by {distance:.1e}, more than {TOLERANCE[form]:.0e} of their size")
        if found["made"].shape[1] != LENGTH + NEW_TOKENS:
            problems.append(f"generate made {found['made'].shape[1] - LENGTH} tokens, not {NEW_TOKENS}")
    name = checkpoint.folder.name
    return Verification(name, form, found.get("class"), distance, TOLERANCE[form], problems, clients)


def form_of(checkpoint: Checkpoint) -> str:
    """plain, edited or packed (edited or not)."""
    if says_packed(checkpoint.values):
        return "packed"
    return "edited" if "moe_compress" in checkpoint.values else "plain"


def _ids(checkpoint: Checkpoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, checkpoint.config.vocab_size, (ROWS, LENGTH), generator=generator)


@torch.no_grad()
def _ours(checkpoint: Checkpoint) -> torch.Tensor:
    model: Any = load_as_run(checkpoint, torch.float32, torch.device("cpu"))
    logits: torch.Tensor = model(_ids(checkpoint), use_cache=False).logits.float()
    return logits


def _in_fresh_process(checkpoint: Checkpoint, form: str) -> dict[str, Any]:
    """What stock transformers says; ValueError with its last line if it fails."""
    trust = "yes" if "moe_compress" in checkpoint.values else "no"
    with tempfile.TemporaryDirectory() as place:
        ids, out = Path(place) / "ids.safetensors", Path(place) / "out"
        write_shard(ids, {"ids": _ids(checkpoint)})
        # -I: without the caller's folders, so that this package cannot help.
        words = [sys.executable, "-I", "-c", STOCK, str(checkpoint.folder), str(ids), str(out), trust, str(NEW_TOKENS)]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=quiet)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"stock transformers does not load it: {last}")
        return {**read_json(out.with_suffix(".json")), **load_file(out.with_suffix(".safetensors"))}
