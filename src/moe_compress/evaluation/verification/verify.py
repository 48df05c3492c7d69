"""Verifying a checkpoint: loaded by stock transformers in a fresh process, its logits beside ours, and who can load it.

The fresh process cannot import this package: what it loads, anybody can who trusts the code in the checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_compress.checkpoints.load import require_memory
from moe_compress.checkpoints.quantization_config import says_packed
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.evaluation.harnesses import harness
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.evaluation.verification.compatibility import Verdict, compatibility
from moe_compress.models import hf
from moe_compress.reports import table_formats
from moe_compress.reports.table_formats import Cells
from moe_compress.utils.files import read_json

# Relative error of the logits that a format's own arithmetic may make: stock transformers makes packed weights dense in
# the 16 bits of their scales, our reader in fp32.
TOLERANCE = {"plain": 1e-4, "edited": 1e-4, "packed": 2e-2}
ROWS, LENGTH, NEW_TOKENS = 4, 64, 4
NOT_ASKED = 3
STOCK = """
import json, sys
sys.modules["moe_compress"] = None
import torch
from safetensors.torch import load_file, save_file
import transformers
folder, ids, out, trust, tokens, kind, part = sys.argv[1:8]
load = getattr(transformers, kind).from_pretrained
model, info = load(folder, dtype=torch.float32, trust_remote_code=trust == "yes", output_loading_info=True)
for parameter in model.parameters():  # what is made dense of codes, or kept as it was stored, is of 16 bits
    parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
ids = load_file(ids)["ids"]
found = {"wrong": wrong, "class": type(model).__name__, "behind": 0.0, "made": 0}
model = model.get_submodule(part)
with torch.no_grad():
    logits = model.eval()(ids, use_cache=False).logits.float()
save_file({"logits": logits}, out + ".safetensors")
with torch.no_grad():
    # A mask of its own: generate would take random ids that happen to be padding's for padding.
    there = torch.ones_like(ids[:1])
    model.generation_config = transformers.GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    try:
        made = model.generate(ids[:1], attention_mask=there, max_new_tokens=int(tokens), do_sample=False)
        again = model(made, use_cache=False).logits.float()[0, ids.shape[1] - 1 : -1]
        chosen = again.gather(1, made[0, ids.shape[1] :, None])[:, 0]
        found["behind"] = (again.amax(1) - chosen).max().item() / again.abs().max().item()
        found["made"] = len(chosen)
    except Exception as error:
        found["unable"] = f"{type(error).__name__}: {error}"
json.dump(found, open(out + ".json", "w"))
"""


@dataclass(frozen=True)
class Verification(SavedReport):
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
        """Whether stock transformers loaded it, and nothing is wrong."""
        return not self.problems and self.stock_class is not None

    @property
    def exit_code(self) -> int:
        """0 if it passed, 1 if something is wrong, 3 if stock transformers could not be asked."""
        return 0 if self.passed else 1 if self.problems else NOT_ASKED

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "passed": self.passed}

    def markdown(self) -> str:
        """The verdict, and who can load the checkpoint."""
        return as_markdown(self.to_json())


@harness("verify", results="verification")
def verify(checkpoint: str | Path, /, trust_remote_code: bool = False, results: str = "runs") -> Verification:
    """Load a checkpoint by stock transformers in a fresh process, compare logits, generate; who can load it, and why.

    trust_remote_code: run whatever code the checkpoint holds; without it, only files that are this package's, byte for
    byte. Its `problems` are empty where all is well.
    """
    return verification(resolve_model(str(checkpoint)), trust_remote_code)


def verification(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Verification:
    """Load, compare and generate in one fresh process; the same checkpoint by our own reader, layer by layer."""
    require_memory([checkpoint], torch.float32, torch.device("cpu"), "is loaded whole by stock transformers")
    form, clients = checkpoint_kind(checkpoint), compatibility(checkpoint)
    stock = next(verdict for verdict in clients if verdict.client == "transformers")
    found: dict[str, Any] = {}
    problems, distance = [], None
    try:
        if stock.loads:
            found = _in_fresh_process(checkpoint, trust_remote_code or _runs_our_code(checkpoint))
        problems += _wrong_tensors(found.get("wrong", {}), checkpoint.num_layers)
        ours = _ours(checkpoint)
        distance = float((found["logits"] - ours).norm() / ours.norm()) if found else None
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    if distance is not None and not distance <= TOLERANCE[form]:
        problems.append(f"logits differ by {distance:.1e}, more than {TOLERANCE[form]:.0e} of their size")
    if "unable" in found:
        problems.append(f"stock transformers loads it, but generates nothing: {found['unable']}")
    elif found and not (found["made"] and found["behind"] <= TOLERANCE[form]):
        problems.append(f"generate's {found['made']} tokens are not the likeliest ones (by {found['behind']:.1e})")
    name = checkpoint.folder.name
    return Verification(name, form, found.get("class"), distance, TOLERANCE[form], problems, clients)


def _wrong_tensors(found: Mapping[str, Sequence[str]], num_layers: int) -> list[str]:
    """A sentence a kind of tensors that did not load; that prediction layers are not loaded is no problem."""
    wrong = {
        kind: [name for name in names if kind != "unexpected_keys" or not hf.is_prediction_key(name, num_layers)]
        for kind, names in found.items()
    }
    return [f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items() if names]


def checkpoint_kind(checkpoint: Checkpoint) -> str:
    """plain, edited or packed (edited or not)."""
    if says_packed(checkpoint.values):
        return "packed"
    return "edited" if "moe_compress" in checkpoint.values else "plain"


def _ids(checkpoint: Checkpoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, checkpoint.text_config.vocab_size, (ROWS, LENGTH), generator=generator)


def _ours(checkpoint: Checkpoint) -> torch.Tensor:
    """Logits [N, S, V] in fp32, of layers read one by one."""
    ids_NS, cpu = _ids(checkpoint), torch.device("cpu")
    number_NS = torch.arange(len(ids_NS))[:, None].expand_as(ids_NS)
    mask_NS, domain_N = torch.ones_like(ids_NS, dtype=torch.bool), torch.zeros(len(ids_NS), dtype=torch.long)
    windows = Windows(ids_NS, mask_NS, number_NS, domain_N, ("random",), "", {})
    layers = StreamedLayers(checkpoint, cpu, torch.float32)
    _, hidden_NSD = forward_layers(layers, windows)
    return hf.head(layers.model, hidden_NSD.flatten(0, 1)).float().unflatten(0, ids_NS.shape)


def _runs_our_code(checkpoint: Checkpoint) -> bool:
    """Whether loading it runs code of this package; ValueError if it would run any other."""
    if "moe_compress" not in checkpoint.values:
        return False
    foreign = hf.foreign_code(checkpoint.folder, checkpoint.values)
    if foreign:
        raise ValueError(f"{foreign}: code of a checkpoint runs only with trust_remote_code=true; read it first")
    return True


def _in_fresh_process(checkpoint: Checkpoint, trust: bool) -> dict[str, Any]:
    """What stock transformers says; ValueError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as place:
        ids, out = Path(place) / "ids.safetensors", Path(place) / "out"
        write_shard(ids, {"ids": _ids(checkpoint)})
        said = "yes" if trust else "no"
        kind = checkpoint.auto_class
        asked = [str(checkpoint.folder), str(ids), str(out), said, str(NEW_TOKENS), kind.__name__]
        asked.append(hf.text_part(kind._model_mapping[type(checkpoint.config)]))
        done = run_isolated(STOCK, asked, {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules"})
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"stock transformers does not load it: {last}")
        return {**read_json(out.with_suffix(".json")), **load_file(out.with_suffix(".safetensors"))}


def run_isolated(code: str, words: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code in a Python process without the caller's folders, so that this package cannot help."""
    command, environment = [sys.executable, "-I", "-c", code, *words], {**os.environ, **variables}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )


UNASKED = "stock transformers reads no such layout, so there was nothing to compare; moe_compress runs it"


def as_markdown(found: Mapping[str, Any]) -> str:
    """The verdict, what was compared, and a row for every program."""
    verdict = "verified" if found["passed"] else "NOT VERIFIED: " + ("; ".join(found["problems"]) or UNASKED)
    parts = [f"### {found['model']}", f"{found['form']} checkpoint: {verdict}."]
    if found["error"] is not None:
        parts.append(
            f"Stock transformers, without this package, made a {found['stock_class']} of it; its logits "
            f"differ by {found['error']:.1e} of their size (at most {found['tolerance']:.0e})."
        )
    rows = [{"program": c["client"], "loads it": "yes" if c["loads"] else "no", "": c["why"]} for c in found["clients"]]
    return "\n\n".join([*parts, table_formats.markdown(Cells.of(rows))]) + "\n"
