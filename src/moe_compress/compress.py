"""Running a recipe: each stage is a function from checkpoint to checkpoint, planned and then applied by surgery."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress import failures, registry
from moe_compress.cards import CARD, card_of
from moe_compress.checkpoint.claim import claimed
from moe_compress.checkpoint.locate import config_folder, open_model
from moe_compress.checkpoint.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoint.writer import (
    CheckpointWriter,
    begun_bytes,
    manifest_of,
    remove_intermediate,
    remove_scratch,
    require_free,
    stage_folder,
)
from moe_compress.forecast import Forecast, forecast
from moe_compress.measuring import parse_mix
from moe_compress.model import hf
from moe_compress.model.applying import apply_edits, check_edits
from moe_compress.model.edits import Edit, Plan, to_json
from moe_compress.model.forms import form_after, kept_layers
from moe_compress.model.packing_config import packed_edits
from moe_compress.planning import plan_stage
from moe_compress.plans import ARRAYS, PLAN, StagePlan, applied, plan_arrays, plan_values, read_plan
from moe_compress.recipe import Options, Recipe, Stage
from moe_compress.run import Run, text_spec
from moe_compress.runtime import (
    as_json,
    dtype_name,
    fingerprint,
    log,
    peak_memory_bytes,
    require_disk,
    reset_peak_memory,
    tensor_bytes,
)
from moe_compress.slimming import slim
from moe_compress.stream.documents import Use, parts, read_documents, text_identity
from moe_compress.stream.surgery import rewrite
from moe_compress.terminal import progress_bar

MAX_NAME = 120
RECIPE = "recipe.yaml"


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
    _preflight(recipe, out)
    source = open_model(recipe.options.model, recipe.options.revision)
    identities = [_identity(recipe.stages[: n + 1], source, run) for n in range(len(recipe.stages))]
    targets = [*(stage_folder(out, n) for n in range(len(recipe.stages) - 1)), out]
    if _made_by(out, identities[-1]):
        log.info("%s is already there, made by this very recipe.", out)
        remove_scratch(out)
    else:
        require_free(out)
        _read_texts(recipe, source, run)
        with claimed(out, identities), failures.kept(recipe, recipe.options.name or out.name, run):
            _run_stages(recipe, source, targets, identities, run)
    for folder in targets[:-1]:
        remove_intermediate(folder)
    return Outcome(out, source, manifest_of(out) or {})


def _preflight(recipe: Recipe, out: Path) -> None:
    """Whatever can fail before a weight is fetched or read: counts, texts, the folder, the disk."""
    options = recipe.options
    expected = forecast(recipe, config_folder(options.model, options.revision))
    parse_mix(options.mix)
    uses = _uses(recipe)
    for use in uses:
        for part in parts(text_spec(options, use)):
            read_documents(part)
    if manifest_of(out) is None:
        require_free(out)
        require_disk(out.parent, _to_be_written(recipe, expected, out), "the new checkpoint")
        fewer = "use fewer or shorter windows (samples=, length=), or another disk with results="
        boundaries = 2 * expected.boundary_bytes if "calibration" in uses else 0
        require_disk(Path(options.results), boundaries, "the calibration's hidden states", fewer)


def _to_be_written(recipe: Recipe, expected: Forecast, out: Path) -> int:
    """Bytes of the checkpoints that are not there yet: those of earlier stages are kept until the end."""
    earlier = [stage_folder(out, n) for n in range(len(recipe.stages) - 1)]
    sizes = {out: expected.after.bytes, **dict.fromkeys(earlier, expected.before.bytes)}
    return sum(size - begun_bytes(folder) for folder, size in sizes.items() if manifest_of(folder) is None)


def _uses(recipe: Recipe) -> list[Use]:
    text = any(stage.needs in registry.FROM_TEXT for stage in recipe.stages)
    uses: dict[Use, bool] = {"calibration": text, "heldout": recipe.options.eval}
    return [use for use, needed in uses.items() if needed]


def _read_texts(recipe: Recipe, source: Checkpoint, run: Run) -> None:
    """Tokenize all texts before the first forward, so that none can fail after it."""
    for use in _uses(recipe):
        windows = run.windows(use, source)
        if use == "calibration":
            parse_mix(run.options.mix, windows.domains)


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
    through_model: bool = False
    slims: Stage | None = None


def _plan_job(
    stage: Stage, source: Checkpoint, origin: Checkpoint, target: Path, earlier: Path | None, run: Run
) -> _Job:
    before = (manifest_of(earlier) if earlier else None) or {"report": [], "stages": []}
    scope = registry.find(stage.method).scope
    plan, calibration = plan_stage(stage, source, run) if scope == "model" else (Plan([], {}, {}), {})
    report = {"method": stage.method, "calibration": calibration, **plan.report}
    if plan.scores:
        report["scores"] = {str(layer): [_short(value) for value in values] for layer, values in plan.scores.items()}
    done = {"method": stage.method, "given": stage.given, "parameters": stage.parameters}
    return _Job(
        source=source,
        origin=origin,
        target=target,
        edits=plan.edits,
        plan=[*(read_plan(earlier / PLAN)[0] if earlier else []), StagePlan(stage.method, plan, stage.given)],
        report=[*before["report"], report],
        stages=[*before["stages"], done],
        through_model=scope == "layer",
        slims=stage if scope == "weight" else None,
    )


def _short(value: float | None) -> float | None:
    """To six digits; the plan has them all."""
    return None if value is None else float(f"{value:.6g}")


def _write(job: _Job, about: Mapping[str, Any], files: Mapping[str, str], run: Run) -> None:
    """Write the edited checkpoint: plain where stock transformers can express it, else edited."""
    if job.edits:
        skeleton = hf.skeleton(job.source.config, job.source.stored_dtype)
        apply_edits(skeleton, packed_edits(skeleton, job.source.values))
        check_edits(skeleton, job.edits)
    after = form_after(job.source.values, job.edits)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    started = time.perf_counter()
    with progress_bar("writing") as progress:
        layers = kept_layers([to_json(edit) for edit in job.edits], job.source.num_layers)
        writer = CheckpointWriter(
            job.target, job.source, str(about["identity"]), keep_extra_layers=not job.edits, layers=layers
        )
        if job.slims is not None:
            slimmed = slim(job.slims, job.source, run, writer, progress)
            job.report[-1] |= slimmed.report
            after = form_after({**job.source.values, **slimmed.values}, slimmed.edits)
        else:
            rewrite(job.source, job.edits, writer, fill=after.fill, through_model=job.through_model, progress=progress)
        cost = {"surgery_seconds": time.perf_counter() - started, "peak_bytes": peak_memory_bytes(cpu)}
        form = "plain" if after.plain and "moe_compress" not in after.values else "edited"
        manifest = {**about, "form": form, "stages": job.stages, "report": job.report, "cost": cost}
        plan = as_json(plan_values(job.plan, about["base"]))
        card = card_of(job.target.name, job.origin, manifest, after.values)
        writer.finish(after.values, manifest, {**files, PLAN: plan, CARD: card}, {ARRAYS: plan_arrays(job.plan)})
    run.log.event("written", folder=str(job.target), form=form, **cost)
    log.info("%s checkpoint written: %s", form, job.target)


def apply_plan_file(path: Path, options: Options, run: Run, any_model: bool = False) -> Outcome:
    """Apply a saved (perhaps hand-edited) plan to the model it names, or to `model=`; runs no calibration.

    Raises ValueError if that is not the model the plan was made for, unless `any_model`.
    """
    stages, base = read_plan(path)
    for stage in stages:
        if stage.method in registry.METHODS and registry.find(stage.method).scope == "weight":
            raise ValueError(
                f"{path}: its stage {stage.method} changes weights, which no plan holds: run the recipe.yaml beside it."
            )
    edits = [edit for stage in stages for edit in stage.plan.edits]
    model = options.model or base["model"]
    source = open_model(model, options.revision or (None if options.model else base.get("commit")))
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
        with claimed(out, [identity]):
            _write(job, about, {}, run)
    return Outcome(out, source, manifest_of(out) or {})


def default_name(recipe: Recipe) -> str:
    """A name for folder and record: model, methods with what differs from their defaults, a short identity."""
    parts = [Path(os.path.abspath(recipe.options.model)).name]
    for stage in recipe.stages:
        parts += [stage.method, *(f"{key}-{value}" for key, value in stage.given.items())]
    name = "".join(c if c.isalnum() or c in "-_." else "." for c in "-".join(parts))
    return f"{name[:MAX_NAME]}-{fingerprint(recipe.to_yaml())[:6]}"


def _identity(stages: list[Stage], source: Checkpoint, run: Run) -> str:
    """What the weights of a checkpoint depend on."""
    steps = [stage.model_dump(mode="json") for stage in stages]
    options = run.options
    arithmetic = [dtype_name(run.dtype), run.device.type, options.attn]
    if all(stage.needs not in registry.FROM_TEXT for stage in stages):
        # Noise is run through layers, and weights are read, in the arithmetic of the run.
        noisy = any(stage.needs == "noise" or registry.find(stage.method).scope == "weight" for stage in stages)
        return fingerprint(source.fingerprint, steps, *([arithmetic] if noisy else []))
    return fingerprint(
        source.fingerprint, steps, text_identity(text_spec(options, "calibration")), options.mix, arithmetic
    )


def _made_by(folder: Path, identity: str) -> bool:
    """Whether a finished checkpoint is the one that this identity stands for."""
    return (manifest_of(folder) or {}).get("identity") == identity


def _base(source: Checkpoint) -> dict[str, Any]:
    return {"model": source.name, "commit": source.commit, "fingerprint": source.fingerprint}
