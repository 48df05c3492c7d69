"""The routing harness: both models on the same text, and the report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.ancestry import Ancestry
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.engine.forward import forward_layers
from moe_compress.evaluation.harnesses import harness
from moe_compress.evaluation.pair import open_pair
from moe_compress.evaluation.routing.fidelity import Fidelity, RoutingSample, fidelity, free_running, teacher_forced
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import moe_views
from moe_compress.reports import table_formats
from moe_compress.reports.table_formats import Cells
from moe_compress.run.context import Run
from moe_compress.run.option_uses import ARITHMETIC, EVALUATION, MODEL
from moe_compress.run.progress import progress_bar
from moe_compress.utils.choices import Means
from moe_compress.utils.devices import dtype_name, threads
from moe_compress.utils.hashing import fingerprint

HOW = {
    "teacher_forced": "Teacher-forced: each layer of both models on what enters the original's layer",
    "free_running": "Free-running: each model on its own hidden states",
}
MEANING = (
    "Overlap: experts that both use over all that either uses. Flips: tokens whose set of experts differs. KL: of the "
    "router's distribution over experts that are left, nats. Lost: what the original's router gave to experts that are "
    "gone. Shift: half the summed change of the experts' shares of all tokens. CV: standard deviation over mean of the "
    "tokens per expert; busiest: largest over mean; dead: experts without a token, before and after, and the "
    "share of documents below which such an expert is used, with 95 % confidence."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A table for each way of asking, and what the columns mean."""
    text = report["text"]
    title = f"### {report['model']} beside {report['original']}\n\n{text['tokens']:,} tokens of {text['source']}"
    parts = [title]
    for key, how in HOW.items():
        found = report[key]
        cells = Cells.of([_row(layer, values) for layer, values in found["layers"].items()])
        together = ", ".join(f"{name} {_metric(value)}" for name, value in found["together"].items())
        parts.append(f"{how}. In all layers: {together}.")
        parts.append(table_formats.markdown(cells))
    return "\n\n".join([*parts, MEANING]) + "\n"


def _row(layer: Any, found: Mapping[str, Any]) -> dict[str, str]:
    before, after = found["before"], found["after"]
    return {
        "layer": f"{layer}" if int(layer) == found["source"] else f"{layer} (was {found['source']})",
        **{name: _metric(found[name]) for name in ("overlap", "flips", "kl", "lost")},
        "shift": f"{found['utilisation_shift']:.4f}",
        "CV": f"{before['cv']:.2f} -> {after['cv']:.2f}",
        "busiest": f"{before['busiest']:.2f} -> {after['busiest']:.2f}",
        "dead": f"{len(before['dead'])} -> {len(after['dead'])}" + _bound(after),
    }


def _bound(found: Mapping[str, Any]) -> str:
    return f" (below {found['dead_below']:.1%})" if found["dead"] else ""


def _metric(found: Mapping[str, Any]) -> str:
    return table_formats.with_interval(found["value"], found["interval"], ".4f")


def ancestry_of(checkpoint: Checkpoint, base: Checkpoint) -> Ancestry:
    """From the plan in the checkpoint's folder, where it has one.

    Raises ValueError if that was made from another model, or what it has now does not come from what is said there.
    """
    plan, manifest = checkpoint.folder / PLAN, read_manifest(checkpoint.folder) or {}
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
class RoutingReport(SavedReport):
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


@harness("routing", options=(*EVALUATION, *ARITHMETIC, *MODEL, "results"))
def routing(
    checkpoint: str | Path,
    /,
    original: Annotated[str | None, Means("none: the one that it was made from")] = None,
    **options: Any,
) -> RoutingReport:
    """How far a checkpoint routes otherwise than its original: on its own hidden states, and on the original's."""
    opened, base, run = open_pair(checkpoint, original, options, "routing")
    with threads(run.options.threads):
        return routing_report(opened, base, run)


def routing_report(checkpoint: Checkpoint, base: Checkpoint, run: Run) -> RoutingReport:
    """Run the evaluation text through both models, and through the compressed one's layers on the original's inputs."""
    ancestry, windows = ancestry_of(checkpoint, base), run.windows("heldout", base)
    original, other = (run.layers(each) for each in (base, checkpoint))
    with progress_bar("teacher-forced") as progress:
        before, after = teacher_forced(original, other, ancestry, windows, progress)
    forced = fidelity(before, after, ancestry, windows)
    watch = RoutingSample(family_of(checkpoint.config), windows)
    with progress_bar("free-running") as progress:
        seen, _ = forward_layers(other, windows, [watch], progress=progress)
    free = fidelity(before, free_running(seen), ancestry, windows)
    text = {**windows.description, "fingerprint": windows.fingerprint}
    arithmetic = (dtype_name(run.dtype), run.device.type, run.options.attn)
    identity = fingerprint(checkpoint.fingerprint, base.fingerprint, windows.fingerprint, arithmetic)
    return RoutingReport(checkpoint.folder.name, Path(base.name).name, text, free, forced, identity)
