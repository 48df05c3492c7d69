"""Running a recipe: each stage is a function from checkpoint to checkpoint, planned and then applied by surgery."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress import registry
from moe_compress.checkpoint.locate import open_model
from moe_compress.checkpoint.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoint.writer import CheckpointWriter, manifest_of, require_free
from moe_compress.model import hf
from moe_compress.model.edits import Plan, check_edits, edited_values, split_values
from moe_compress.planning import calibration_spec, dry_run, plan_stage, plan_values, read_plan
from moe_compress.recipe import Options, Recipe, Stage
from moe_compress.run import Run
from moe_compress.runtime import (
    dtype_name,
    fingerprint,
    log,
    peak_memory_bytes,
    require_disk,
    reset_peak_memory,
    write_json,
)
from moe_compress.stream.surgery import rewrite
from moe_compress.terminal import progress_bar

PLAN = "plan.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Outcome:
    """A finished compression: where it is, what it was made from, its manifest, and what it cost (seconds)."""

    folder: Path
    source: Checkpoint
    manifest: dict[str, Any]


def compress_checkpoint(recipe: Recipe, run: Run) -> Outcome:
    """Run every stage; a recipe whose checkpoint is already there is not run again.

    Raises ValueError before any weight is read for all that the config can tell.
    """
    source = open_model(recipe.options.model, recipe.options.revision)
    out = Path(recipe.options.out) if recipe.options.out else run.results("checkpoints") / default_name(recipe)
    identities = [_identity(recipe.stages[: n + 1], source, run) for n in range(len(recipe.stages))]
    if (manifest_of(out) or {}).get("identity") == identities[-1]:
        log.info("%s is already there, made by this very recipe.", out)
        return Outcome(out, source, manifest_of(out) or {})
    require_free(out)
    dry_run(recipe, hf.skeleton(source.config, source.stored_dtype, recipe.options.attn))
    require_disk(out.parent, source.bytes * min(2, len(recipe.stages)), "the new checkpoint")
    current = source
    for number, stage in enumerate(recipe.stages):
        last = number == len(recipe.stages) - 1
        target = out if last else _stage_folder(out, number)
        if (manifest_of(target) or {}).get("identity") != identities[number]:
            about = {"identity": identities[number], "base": _base(source), "recipe": recipe.to_yaml()}
            _run_stage(stage, current, target, about, run)
        current = open_checkpoint(target)
    for number in range(len(recipe.stages) - 1):
        shutil.rmtree(_stage_folder(out, number))
    return Outcome(out, source, manifest_of(out) or {})


def _run_stage(stage: Stage, source: Checkpoint, target: Path, about: dict[str, Any], run: Run) -> None:
    require_free(target)
    earlier = (manifest_of(source.folder) or {}).get("report", [])
    if registry.find(stage.method).scope == "layer":
        plan, calibration = Plan([], {}, {}), dict[str, Any]()
    else:
        plan, calibration = plan_stage(stage, source, run)
    about["report"] = [*earlier, {"method": stage.method, "calibration": calibration, **plan.report}]
    stages = (manifest_of(source.folder) or {}).get("stages", [])
    about["stages"] = [*stages, {"method": stage.method, "given": stage.given, "parameters": stage.parameters}]
    apply_plan(stage.method, plan, source, target, about, run)


def apply_plan(method: str, plan: Plan, source: Checkpoint, target: Path, about: Mapping[str, Any], run: Run) -> None:
    """Write the edited checkpoint: plain where stock transformers can express it, else edited."""
    skeleton = hf.skeleton(source.config, source.stored_dtype)
    check_edits(skeleton, plan.edits)
    through_model = registry.METHODS[method].scope == "layer" if method in registry.METHODS else False
    values, plain = edited_values(source.values, plan.edits)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    started = time.perf_counter()
    with progress_bar("writing") as progress:
        writer = CheckpointWriter(target, source, str(about["identity"]), keep_extra_layers=not plan.edits)
        rewrite(source, plan.edits, writer, through_model=through_model, progress=progress)
        write_json(writer.partial / PLAN, plan_values(plan, about["base"], method))
        form = "plain" if plain and "moe_compress" not in values else "edited"
        cost = {"surgery_seconds": time.perf_counter() - started, "peak_bytes": peak_memory_bytes(cpu)}
        (writer.partial / RECIPE).write_text(about["recipe"] or "", encoding="utf-8")
        writer.finish(values, {**about, "form": form, "cost": cost})
    run.log.event("written", method=method, folder=str(target), form=form, **cost)
    log.info("%s checkpoint written: %s", form, target)


def apply_plan_file(path: Path, options: Options, run: Run) -> Outcome:
    """Apply a saved (perhaps hand-edited) plan to the model it names, or to `model=`; runs no calibration."""
    edits, base = read_plan(path)
    model = options.model or base["model"]
    source = open_model(model, options.revision)
    if base.get("fingerprint") != source.fingerprint:
        log.warning("the plan was made for %s; it is applied to %s, which differs.", base.get("model"), model)
    identity = fingerprint(source.fingerprint, [repr(edit) for edit in edits])
    name = f"{Path(source.name).name}-plan-{identity[:6]}"
    out = Path(options.out) if options.out else run.results("checkpoints") / name
    if (manifest_of(out) or {}).get("identity") != identity:
        require_free(out)
        require_disk(out.parent, source.bytes, "the new checkpoint")
        about = {"identity": identity, "base": _base(source), "recipe": None, "report": [{"method": "plan"}]}
        apply_plan("plan", Plan(edits, {}, {}), source, out, about, run)
    return Outcome(out, source, manifest_of(out) or {})


def default_name(recipe: Recipe) -> str:
    """A name for folder and record: model, methods with what differs from their defaults, a short identity."""
    parts = [Path(recipe.options.model).name]
    for stage in recipe.stages:
        parts += [stage.method, *(f"{key}-{value}" for key, value in stage.given.items())]
    name = "-".join([*parts, fingerprint(recipe.to_yaml())[:6]])
    return "".join(c if c.isalnum() or c in "-_." else "." for c in name)


def _stage_folder(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}.stage{number + 1}")


def _identity(stages: list[Stage], source: Checkpoint, run: Run) -> str:
    """What the weights of a checkpoint depend on."""
    steps = [stage.model_dump(mode="json") for stage in stages]
    text = any(stage.needs == "text" for stage in stages)
    measured = [repr(calibration_spec(run.options)), run.options.mix, dtype_name(run.dtype)] if text else []
    return fingerprint(source.fingerprint, steps, measured)


def _base(source: Checkpoint) -> dict[str, Any]:
    return {"model": source.name, "commit": source.commit, "fingerprint": source.fingerprint}


def edits_so_far(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The edits that an edited checkpoint replays; none for a plain one."""
    return split_values(checkpoint.values)[1]
