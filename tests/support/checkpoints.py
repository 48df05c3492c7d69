"""What lies in a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.models import hf
from moe_compress.models.shape import moe_shapes


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def same_checkpoint(a: Path, b: Path) -> bool:
    files = ("config.json", "model.safetensors.index.json", "tokenizer.json")
    return weights(a) == weights(b) and all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def kept(folder: Path) -> dict[int, list[int]]:
    """Layer -> kept experts by their first numbers, from the saved plan of an expert drop."""
    found: dict[int, list[int]] = {}
    for stage in json.loads((folder / "plan.json").read_text())["stages"]:
        for edit in stage["edits"]:
            before = found.get(edit["layer"])
            found[edit["layer"]] = [before[e] for e in edit["experts"]] if before else edit["experts"]
    return found


def scores(folder: Path) -> dict[str, list[float]]:
    """Layer -> scores of the only stage, from the saved plan."""
    (stage,) = json.loads((folder / "plan.json").read_text())["stages"]
    return stage["scores"]


def counts(folder: Path) -> dict[int, int]:
    """Layer -> experts that the checkpoint holds."""
    checkpoint = open_checkpoint(folder)
    return {s.layer: s.num_experts for s in moe_shapes(hf.skeleton(checkpoint.config, torch.float32))}


def streamed(checkpoint: Checkpoint) -> Any:
    """The model as this package reads it, in fp32."""
    model = hf.skeleton(checkpoint.config, torch.float32)
    with checkpoint.read(checkpoint.tensors) as tensors:
        hf.materialize(model, tensors, torch.device("cpu"))
    model.tie_weights()
    hf.buffers_to(model, torch.device("cpu"))
    return model.eval()
