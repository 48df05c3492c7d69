"""Routing fidelity of checkpoints: what became of the original's experts, both ways of asking, and the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.writer import manifest_of
from moe_compress.harness.routing import (
    Ancestry,
    Fidelity,
    RoutingSample,
    fidelity,
    free_running,
    teacher_forced,
)
from moe_compress.kept import Identified
from moe_compress.model import hf
from moe_compress.model.families import family_of
from moe_compress.model.moe import moe_views
from moe_compress.plans import PLAN, read_plan
from moe_compress.report.routing import as_markdown
from moe_compress.run import Run
from moe_compress.runtime import dtype_name, fingerprint
from moe_compress.stream.fold import StreamedLayers, fold
from moe_compress.terminal import progress_bar


def ancestry_of(checkpoint: Checkpoint, base: Checkpoint) -> Ancestry:
    """From the plan in the checkpoint's folder, where it has one.

    Raises ValueError if that was made from another model, or what it has now does not come from what is said there.
    """
    plan, manifest = checkpoint.folder / PLAN, manifest_of(checkpoint.folder) or {}
    if manifest and manifest["base"]["fingerprint"] != base.fingerprint:
        raise ValueError(f"{checkpoint.name} was not made from {base.name}: whose experts are whose is not known.")
    stages = read_plan(plan)[0] if manifest and plan.is_file() else []
    edits = [edit for stage in stages for edit in stage.plan.edits]
    before, after = (
        {index: view.num_experts for index, view in moe_views(hf.skeleton(each.config, torch.bfloat16)).items()}
        for each in (base, checkpoint)
    )
    found = Ancestry.of(edits, base.num_layers, before)
    placed = {index: 1 + max(place) for index, place in found.place.items() if index in after}
    if len(found.source) != checkpoint.num_layers or placed != after:
        raise ValueError(
            f"{checkpoint.name} has other layers or experts than {base.name}, and "
            + (f"its {PLAN} does not lead to them." if stages else f"no {PLAN} that says which is which.")
        )
    return found


@dataclass(frozen=True)
class RoutingReport(Identified):
    """Both ways of asking, on one text; `text`: which."""

    model: str
    original: str
    text: dict[str, Any]
    free_running: Fidelity
    teacher_forced: Fidelity
    id: str

    def markdown(self) -> str:
        """A table for each way of asking."""
        return as_markdown(self.to_json())


def routing_report(checkpoint: Checkpoint, base: Checkpoint, run: Run) -> RoutingReport:
    """Run the evaluation text through both models, and through the compressed one's layers on the original's inputs."""
    ancestry, windows = ancestry_of(checkpoint, base), run.windows("heldout", base)
    original, other = (StreamedLayers(each, run.device, run.dtype, run.options.attn) for each in (base, checkpoint))
    with progress_bar("teacher-forced") as progress:
        before, after = teacher_forced(original, other, ancestry, windows, progress)
    forced = fidelity(before, after, ancestry, windows)
    watch = RoutingSample(family_of(checkpoint.config), windows)
    with progress_bar("free-running") as progress:
        seen, _ = fold(other, windows, [watch], progress=progress)
    free = fidelity(before, free_running(seen), ancestry, windows)
    text = {**windows.description, "fingerprint": windows.fingerprint}
    arithmetic = (dtype_name(run.dtype), run.device.type, run.options.attn)
    identity = fingerprint(checkpoint.fingerprint, base.fingerprint, windows.fingerprint, arithmetic)
    return RoutingReport(checkpoint.folder.name, Path(base.name).name, text, free, forced, identity)
