"""What trimming recipes write, and models made easy to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import Edit, Plan
from moe_compress.edits.plan_file import read_plan
from moe_compress.methods import registry
from moe_compress.models import hf


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*.safetensors"))}


def skeleton(folder: Path) -> Any:
    return hf.skeleton(open_checkpoint(folder).config, torch.float32)


def plan_edits(folder: Path) -> list[Edit]:
    return [edit for stage in read_plan(folder / "plan.json")[0] for edit in stage.plan.edits]


def planned(model: ModelStatistics, sentence: str) -> Plan:
    name, *words = sentence.split()
    method = registry.find(name)
    return method.run(model, **method.bind(dict(word.split("=") for word in words)))


def planning_report(plan: Plan) -> dict[str, Any]:
    """What goes into plan.json beside the edits."""
    return {"scores": {str(k): v for k, v in plan.scores.items()}, "report": plan.report}


def same_checkpoint(one: Path, other: Path, without: Sequence[str] = ()) -> None:
    names = {path.name for path in one.iterdir()} - {"moe_compress.json", "README.md", *without}
    assert names == {path.name for path in other.iterdir()} - {"moe_compress.json", "README.md", *without}
    different = [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == []


def batched(model: Any) -> Any:
    model.set_experts_implementation("batched_mm")
    return model
