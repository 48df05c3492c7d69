"""Running a recipe: each stage is a function from checkpoint to checkpoint, planned and then applied by surgery."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_compress.checkpoints.folder import (
    CARD,
    RECIPE,
    STATISTICS,
    begun_bytes,
    read_manifest,
    remove_intermediate,
    remove_scratch,
    require_free,
    stage_folder,
)
from moe_compress.checkpoints.gguf.base_model import shape_values
from moe_compress.checkpoints.life_signs import living
from moe_compress.checkpoints.lock import exclusive_output
from moe_compress.checkpoints.partly_packed import after_edits
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.checkpoints.steps import TRAINING, require_own_steps
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression import failures
from moe_compress.compression.factor_statistics import factor_statistics
from moe_compress.compression.full_matrices import FACTORED
from moe_compress.compression.planning import plan_stage
from moe_compress.compression.preflight import default_name, made_before, preflight, read_texts, stage_identity
from moe_compress.compression.recovery.checks import check_teachers, require_shareable, trains_end_to_end
from moe_compress.compression.recovery.stage import run_recovery_stage
from moe_compress.compression.rounding import times_rounded
from moe_compress.compression.surgery import rewrite
from moe_compress.compression.weights.factor_stage import run_factor_stage
from moe_compress.compression.weights.stage import WeightStageResult, run_weight_stage
from moe_compress.edits.apply import check_edits
from moe_compress.edits.checks import require_few
from moe_compress.edits.edits import Edit, FactorExperts, PackMatrices, Plan, to_json
from moe_compress.edits.plan_file import ARRAYS, PLAN, StagePlan, applied, plan_arrays, plan_values, read_plan
from moe_compress.edits.resulting_config import ResultingConfig, kept_layers, resulting_config, split_values
from moe_compress.engine.forward import Progress
from moe_compress.hub.card import card_of
from moe_compress.methods import registry
from moe_compress.models import hf
from moe_compress.recipes.recipe import Recipe, Stage
from moe_compress.run.context import Run
from moe_compress.run.options import Options
from moe_compress.run.progress import progress_bar
from moe_compress.utils.devices import measured_cost, peak_memory_bytes
from moe_compress.utils.files import as_json, require_disk
from moe_compress.utils.hashing import fingerprint, tensor_bytes
from moe_compress.utils.logging import log


@dataclass(frozen=True)
class Outcome:
    """A finished compression: where it is, what it was made from, its manifest, and what it cost (seconds)."""

    folder: Path
    source: Checkpoint
    manifest: dict[str, Any]


def compress_checkpoint(recipe: Recipe, run: Run) -> Outcome:
    """Run every stage; a recipe whose checkpoint is already there is not run again.

    Raises ValueError before any weight is fetched or read for all that can be known by then.
    """
    out = Path(recipe.options.out) if recipe.options.out else run.results("checkpoints") / default_name(recipe)
    preflight(recipe, out)
    source = resolve_model(recipe.options.model, recipe.options.revision)
    check_teachers(recipe, source, run)
    require_shareable(recipe, run)
    identities = [stage_identity(recipe.stages[: n + 1], source, run) for n in range(len(recipe.stages))]
    if not recipe.options.out:
        out = made_before(out, identities[-1])
    targets = [*(stage_folder(out, n) for n in range(len(recipe.stages) - 1)), out]
    if _made_by(out, identities[-1]):
        log.info("%s is already there, made by this very recipe.", out)
        remove_scratch(out)
    else:
        require_free(out)
        for target, identity in zip(targets, identities, strict=True):
            require_own_steps(target, identity)
        read_texts(recipe, source, run)
        trained = [trains_end_to_end(stage) for stage in recipe.stages]
        with (
            exclusive_output(out, identities),
            failures.record_failure(recipe, recipe.options.name or out.name, run),
            living(dict(itertools.compress(zip(targets, identities, strict=True), trained))),
        ):
            _run_stages(recipe, source, targets, identities, run)
    for folder in targets[:-1]:
        remove_intermediate(folder)
    return Outcome(out, source, read_manifest(out) or {})


def _run_stages(
    recipe: Recipe, source: Checkpoint, targets: Sequence[Path], identities: Sequence[str], run: Run
) -> None:
    current, earlier = source, None
    for stage, target, identity in zip(recipe.stages, targets, identities, strict=True):
        if not _made_by(target, identity):
            remove_intermediate(target)
            require_free(target)
            job = _plan_job(stage, current, source, target, earlier, run)
            about: dict[str, Any] = {"identity": identity, "base": _base(source)}
            about["intermediate"] = target is not targets[-1]
            _write(job, about, {RECIPE: recipe.to_yaml()}, run)
        current, earlier = open_checkpoint(target), target


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A checkpoint to be written: from what, with which edits; `plan` is that of all stages up to this one."""

    source: Checkpoint
    origin: Checkpoint
    target: Path
    edits: Sequence[Edit]
    plan: list[StagePlan]
    report: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    stage: Stage | None = None


def _plan_job(
    stage: Stage, source: Checkpoint, origin: Checkpoint, target: Path, earlier: Path | None, run: Run
) -> _Job:
    before = (read_manifest(earlier) if earlier else None) or {"report": [], "stages": []}
    scope = registry.find(stage.method).scope
    plan, calibration = plan_stage(stage, source, run) if scope == "model" else (Plan([], {}, {}), {})
    report = {"method": stage.method, "calibration": calibration, **plan.report}
    if plan.scores:
        report["scores"] = {str(layer): [_short(value) for value in values] for layer, values in plan.scores.items()}
    done = {"method": stage.method, "given": stage.explicit_parameters, "parameters": stage.lasting_parameters}
    return _Job(
        source=source,
        origin=origin,
        target=target,
        edits=plan.edits,
        plan=[
            *(read_plan(earlier / PLAN)[0] if earlier else []),
            StagePlan(stage.method, plan, stage.explicit_parameters),
        ],
        report=[*before["report"], report],
        stages=[*before["stages"], done],
        stage=stage if scope != "model" else None,
    )


def _short(value: float | None) -> float | None:
    """To six digits; the plan has them all."""
    return None if value is None else float(f"{value:.6g}")


def _write(job: _Job, about: Mapping[str, Any], files: Mapping[str, str], run: Run) -> None:
    """Write the edited checkpoint: plain where stock transformers can express it, else edited."""
    values: Mapping[str, Any] = job.source.values
    if job.edits:
        skeleton = hf.skeleton(job.source.config, job.source.stored_dtype)
        hf.remember_names(skeleton, job.source.tensors)  # what the config names is named as the files have it
        values = after_edits(values, skeleton, job.edits)
        check_edits(skeleton, job.edits)
    after = resulting_config(values, job.edits)
    cpu = torch.device("cpu")
    with measured_cost(cpu) as measured, progress_bar("writing") as progress:
        layers = kept_layers([to_json(edit) for edit in job.edits], job.source.num_layers)
        writer = CheckpointWriter(
            job.target, job.source, str(about["identity"]), keep_prediction_layers=not job.edits, layers=layers
        )
        writer.values = values
        if job.stage is not None:
            done_stage = _carry_out(job, job.stage, about, files, run, writer, progress)
            job.report[-1] |= done_stage.report
            after = resulting_config(done_stage.values, done_stage.edits)
        else:
            dense = hf.skeleton(hf.config_from(after.values), job.source.stored_dtype) if after.dense else None
            rewrite(job.source, job.edits, writer, fill=after.fill, dense=dense, progress=progress)
    rounded = times_rounded(job.source, job.report[-1])
    job.report[-1] |= {"rounded": rounded} if rounded else {}
    cost = {"surgery_seconds": measured["seconds"], "peak_bytes": measured["peak_bytes"]}
    form = _finish(job, writer, {**about, **_training(job, str(about["identity"]))}, after, files, cost)
    run.log.event("written", folder=str(job.target), form=form, **cost)
    log.info("%s checkpoint written: %s", form, job.target)


def _finish(
    job: _Job,
    writer: CheckpointWriter,
    about: Mapping[str, Any],
    after: ResultingConfig,
    files: Mapping[str, str],
    cost: Mapping[str, float],
) -> str:
    """Make a checkpoint of what is written; its form."""
    form = "plain" if after.plain and "moe_compress" not in after.values else "edited"
    manifest = {**about, "form": form, "stages": job.stages, "report": job.report, "cost": cost}
    plan = as_json(plan_values(job.plan, {**about["base"], "shape": shape_values(job.origin.config)}))
    card = card_of(writer.out.name, job.origin, manifest, after.values)
    said = {**files, **_statistics(after.values), PLAN: plan, CARD: card}
    writer.finish(after.values, manifest, said, {ARRAYS: plan_arrays(job.plan)})
    return form


def _training(job: _Job, run: str) -> dict[str, Any]:
    """What the manifest says of a training from end to end: how far it is; nothing where there was none."""
    found = job.report[-1].get(TRAINING)
    if job.stage is None or found is None:
        return {}
    steps, losses = job.stage.parameters["steps"], found["recent"]
    return {TRAINING: {"run": run, "step": found["steps"], "steps": steps, "tokens": found["tokens"], "losses": losses}}


def _finish_step(
    job: _Job,
    about: Mapping[str, Any],
    files: Mapping[str, str],
    run: Run,
    writer: CheckpointWriter,
    report: Mapping[str, Any],
) -> None:
    """Make a checkpoint of the student so far: as that of the stage will be, but for what it says of itself."""
    step = report[TRAINING]["steps"]
    last = job.stages[-1]
    said = {**last, **{key: {**last[key], "step": step} for key in ("given", "parameters")}}
    so_far = replace(job, report=[*job.report[:-1], {**job.report[-1], **report}], stages=[*job.stages[:-1], said])
    about = {**about, **_training(so_far, str(about["identity"])), "identity": writer.identity}
    cost = {"surgery_seconds": report[TRAINING]["seconds"], "peak_bytes": peak_memory_bytes(run.device)}
    _finish(so_far, writer, about, resulting_config(job.source.values, ()), files, cost)
    run.log.event("checkpoint", folder=str(writer.out), step=step)
    log.info("step %d written: %s", step, writer.out)


def _carry_out(
    job: _Job,
    stage: Stage,
    about: Mapping[str, Any],
    files: Mapping[str, str],
    run: Run,
    writer: CheckpointWriter,
    progress: Progress | None,
) -> WeightStageResult:
    """A stage that changes weights, by the engine of its kind."""
    method = registry.find(stage.method)
    if method.scope == "recovery":
        edits = [edit for earlier in job.plan for edit in earlier.plan.edits]
        finish = functools.partial(_finish_step, job, about, files, run)
        return run_recovery_stage(stage, job.source, job.origin, edits, run, writer, finish, progress)
    engine = run_factor_stage if method.implementation.factoring is not None else run_weight_stage
    return engine(stage, job.source, run, writer, progress)


def _statistics(values: Mapping[str, Any]) -> dict[str, str]:
    """What factors save, as a file of the checkpoint; none for one without."""
    if not any(edit["edit"] == FACTORED for edit in split_values(values)[1]):
        return {}
    stored = hf.stored_dtype(values)
    found = factor_statistics(hf.skeleton(hf.config_from(values), stored), stored.itemsize)
    return {STATISTICS: yaml.safe_dump(found, sort_keys=False)}


def read_structural_plan(path: Path) -> tuple[list[StagePlan], dict[str, Any]]:
    """(stages, their model) of a plan that holds all there is to do: ValueError if that is weights, or nothing."""
    stages, base = read_plan(path)
    for stage in stages:
        if stage.method in registry.METHODS and registry.find(stage.method).scope != "model":
            raise ValueError(
                f"{path}: its stage {stage.method} changes weights, which no plan holds: run the recipe.yaml beside it."
            )
    if not any(stage.plan.edits for stage in stages):
        raise ValueError(
            f"{path} holds no edits, so it changes nothing of its model: write at least one under a stage."
        )
    return stages, base


def apply_plan_file(path: Path, options: Options, run: Run, any_model: bool = False) -> Outcome:
    """Apply a saved (perhaps hand-edited) plan to the model it names, or to `model=`; runs no calibration.

    Raises ValueError if that is not the model the plan was made for, unless `any_model`.
    """
    stages, base = read_structural_plan(path)
    edits = [edit for stage in stages for edit in stage.plan.edits]
    packed = next((edit for edit in edits if isinstance(edit, PackMatrices)), None)
    if packed is not None:
        raise ValueError(
            f"{path}: its edit pack_matrices of layer {packed.layer} makes room for codes, which no plan holds: "
            "quantize by a recipe."
        )
    factored = next((edit for edit in edits if isinstance(edit, FactorExperts)), None)
    if factored is not None:
        raise ValueError(
            f"{path}: its edit factor_experts of layer {factored.layer} makes room for factors, which no plan holds: "
            "factorise by a recipe."
        )
    model = options.model or base["model"]
    source = resolve_model(model, options.revision or (None if options.model else base.get("commit")))
    earlier = source.values.get("moe_compress", {}).get("edits", ())
    require_few(len(earlier) + len(edits), source.num_layers, f"{path}: with those of its model, its edits")
    if base.get("fingerprint") not in (None, source.fingerprint):
        differs = f"the plan was made for {base.get('model')}; {model} is another model, or another version of it"
        if not any_model:
            raise ValueError(f"{differs}: apply it to that one, or say any_model=true.")
        log.warning("%s.", differs)
    arrays = [
        part for edit in edits for name in sorted(edit.arrays) for part in (name, tensor_bytes(edit.arrays[name]))
    ]
    identity = fingerprint(source.fingerprint, [repr(edit) for edit in edits], *arrays)
    name = f"{Path(source.name).name}-plan-{identity[:6]}"
    out = Path(options.out) if options.out else run.results("checkpoints") / name
    run.options = options.model_copy(update={"model": source.name}).resolved()
    if not _made_by(out, identity):
        require_free(out)
        require_disk(out.parent, source.bytes - begun_bytes(out), "the new checkpoint")
        if options.eval:
            run.windows("heldout", source)
        about: dict[str, Any] = {"identity": identity, "base": _base(source)}
        done = [applied(stages, identity)]
        job = _Job(
            source=source, origin=source, target=out, edits=edits, plan=stages, report=[{"method": "plan"}], stages=done
        )
        with exclusive_output(out, [identity]):
            _write(job, about, {}, run)
    return Outcome(out, source, read_manifest(out) or {})


def _made_by(folder: Path, identity: str) -> bool:
    """Whether a finished checkpoint is the one that this identity stands for."""
    return (read_manifest(folder) or {}).get("identity") == identity


def _base(source: Checkpoint) -> dict[str, Any]:
    return {"model": source.name, "commit": source.commit, "fingerprint": source.fingerprint}
