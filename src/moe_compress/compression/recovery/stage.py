"""Stages that recover: a compressed model learns from its teacher, whole or a layer at a time, and is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.load import memory_bytes
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.checkpoints.steps import TRAINING
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.recovery.adapters import (
    Trained,
    adapted_numbers,
    adapted_parameters,
    adapters_on,
)
from moe_compress.compression.recovery.arithmetic import load_dtype
from moe_compress.compression.recovery.assistance import Order, address
from moe_compress.compression.recovery.checks import compares_layers, itself, task_of
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.following import Follower, LayerFollower, before_and_after
from moe_compress.compression.recovery.holdout import Holdout
from moe_compress.compression.recovery.layer_pairs import LayerPair, walk_pairs
from moe_compress.compression.recovery.layer_training import fit_router, rebalance, train_layer
from moe_compress.compression.recovery.lineage import Lineage, edits_from, lineage
from moe_compress.compression.recovery.step_checkpoints import Finish, StepCheckpoints
from moe_compress.compression.recovery.teachers import Teaching, online_bytes, teaching_of
from moe_compress.compression.recovery.trained_codes import CODES, FLOAT_BYTES, SCALES, coded_numbers
from moe_compress.compression.recovery.trained_weights import require_plain, stored_tensors, trained_parameters
from moe_compress.compression.recovery.training_state import Curve, DivergedError, Spent
from moe_compress.compression.recovery.whole_training import changed_by_layer, dtype_of, training_of
from moe_compress.compression.weights.stage import WeightStageResult
from moe_compress.data.windows import Windows
from moe_compress.edits.edits import Edit
from moe_compress.engine.forward import Progress, windows_per_batch
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.recovery_method import Distillation, LayerDistillation, Rebalancing, RouterFit
from moe_compress.methods.stage_options import TEACHER, TrainingOptions
from moe_compress.models import hf
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.run.trackers import open_tracker
from moe_compress.utils.devices import dtype_name, free_memory
from moe_compress.utils.files import gigabytes, read_json, write_json
from moe_compress.utils.logging import log

# A gradient and two moments, in fp32.
BYTES_PER_TRAINED = 12


@dataclass(frozen=True, slots=True)
class _Job:
    """A student that is to be recovered into `writer`, its teacher, the edits between the two, and the text."""

    stage: Stage
    source: Checkpoint
    teacher: Checkpoint
    edits: Sequence[Edit]
    windows: Windows
    run: Run
    writer: CheckpointWriter
    spent: Spent
    progress: Progress | None

    @property
    def options(self) -> TrainingOptions:
        """How it trains."""
        return TrainingOptions.of(self.stage.parameters)


def run_recovery_stage(
    stage: Stage,
    source: Checkpoint,
    origin: Checkpoint,
    edits: Sequence[Edit],
    run: Run,
    writer: CheckpointWriter,
    finish: Finish,
    progress: Progress | None = None,
) -> WeightStageResult:
    """Carry out a stage that recovers into `writer`.

    origin: the model that the recipe starts from; edits: those that led from it to `source`; finish: makes a checkpoint
    of the student so far.
    """
    named = stage.parameters[TEACHER]
    teacher = resolve_model(named) if named else origin
    if teacher.fingerprint == source.fingerprint:
        raise ValueError(itself(source))
    task, spent = task_of(stage), Spent(writer.scratch / "spent.json")
    led = edits_from(teacher, origin) if compares_layers(task) else []
    windows = run.windows("calibration", source)
    log.info("%s: %d tokens of %s (%s).", stage.method, windows.tokens, run.options.data, windows.fingerprint)
    if (batch := stage.parameters.get("batch", 0)) > len(windows):
        log.warning("batch=%d: the text has %d windows, so that a step sees some of them again.", batch, len(windows))
    about = {"calibration": {**windows.description, "seconds": 0.0, "peak_bytes": 0}, "teacher": teacher.name}
    job = _Job(stage, source, teacher, [*led, *edits], windows, run, writer, spent, progress)
    if isinstance(task, Distillation):
        report = _whole(task, job, lambda target, so_far: finish(target, {**about, **so_far}))
    else:
        report = _by_layer(task, job)
    log.info("%s: %s.", stage.method, before_and_after(report) or "nothing was there to be recovered")
    helped = sum(run.processes.all_say(0.0)) if isinstance(task, Distillation) else 0.0
    cost = {"tokens": _tokens(report, windows), "processor_seconds": round(spent.seconds + helped, 3)}
    return WeightStageResult({**about, **report, "recovery": cost}, [], dict(source.values))


def _tokens(report: Mapping[str, Any], windows: Windows) -> int:
    """What was trained on, all steps together (layer by layer: in one layer); of a closed form, what it was made of."""
    trained = [note["tokens"] for note in report.get("layers", {}).values() if "tokens" in note]
    return int(report[TRAINING]["tokens"] if TRAINING in report else max(trained, default=windows.tokens))


def _whole(task: Distillation, job: _Job, finish: Finish) -> dict[str, Any]:
    """Train end to end."""
    source, run, writer, options = job.source, job.run, job.writer, job.options
    Holdout.of(options.holdout, job.windows)
    tracker = open_tracker(options.log, run.results("logs"), writer.out.name, writer.identity, TRAINING)
    _require_room(task, job)
    training, teaching = _prepared(task, job)

    def fill(target: CheckpointWriter) -> None:
        changed = changed_by_layer(source, training)
        for index in (None, *range(source.num_layers)):
            target.copy(index, changed.get(index))

    steps = StepCheckpoints(
        writer.out, source, writer.identity, options.checkpoint_every, options.keep_checkpoints, finish
    )
    steps.begin()

    def write_step(curve: Curve) -> None:
        if curve.steps % options.keep == 0:
            job.spent.keep()
        due = steps.due(curve.steps, options.steps)
        if options.checkpoint_every and run.processes.mesh is not None:
            run.processes.first(due)  # all of them put together what is written
        if due:
            steps.write(curve.steps, fill, {TRAINING: curve.report(options.checkpoint_every)})

    follow = Follower(options, run.log, tracker, job.progress, then=write_step)
    with contextlib.closing(tracker) if tracker is not None else contextlib.nullcontext():
        try:
            report = training.run(_state(job), follow)
        except DivergedError as error:
            raise DivergedError(f"{error} {steps.left()}") from error
    fill(writer)
    count, dtype = run.processes.count, dtype_of(run)
    launched = {"processes": count} if count > 1 else {}
    said = {"dtype": dtype_name(dtype)} if dtype != run.dtype else {}
    return {TRAINING: {**report, **teaching.report, **launched, **said}}


def _prepared(task: Distillation, job: _Job) -> tuple[DistillationRun, Teaching]:
    """A training that can begin, in all processes; who teaches it."""
    run, processes = job.run, job.run.processes
    student, teacher = address(job.source), address(job.teacher)
    processes.first(Order(job.stage, student, teacher, job.edits, job.windows, run.options, _state(job)))
    with processes.together():
        teaching = teaching_of(task, job.teacher, job.windows, run, job.progress)
        return training_of(task, job.options, job.source, teaching, job.edits, job.windows, run), teaching


def _state(job: _Job) -> Path:
    """Where a training is kept, in the numbers that it multiplies in: another launch may do so in others."""
    return (job.writer.scratch / f"training-{dtype_name(dtype_of(job.run))}.safetensors").absolute()


def _require_room(task: Distillation, job: _Job) -> None:
    """ValueError, with what would fit, where two models and what training remembers do not fit into memory."""
    run, dtype = job.run, dtype_of(job.run)
    student, kept = _student_bytes(task, job)
    teacher, free = online_bytes(task, job.teacher, run), free_memory(run.device)
    share = run.processes.count if run.processes.mesh is not None else 1
    beside = run.processes.local if run.device.type == "cpu" else 1
    # What is trained of codes, and an original in few bits, each process has all of.
    whole = (kept if task.trains & {CODES, SCALES} else 0) + (teacher if task.teacher_bits else 0)
    if (whole + (student + teacher + kept - whole) / share) * beside > free:
        among = f", {beside} times" if beside > 1 else ""
        among += f", shared out among {share} processes" if share > 1 else ""
        raise ValueError(
            f"{job.stage.method} takes {gigabytes(student + teacher + kept)}{among} (the model in {dtype_name(dtype)} "
            f"{gigabytes(student)}, its teacher {gigabytes(teacher)}, gradients and moments of what is trained "
            f"{gigabytes(kept)}), but {run.device.type} has {gigabytes(free)} free: train less (router_kd, "
            "train=lora), keep what the teacher says (cache=), share layers out among GPUs (docs/training.md), or "
            "train one layer at a time (layerwise, router_kd solver=ridge)."
        )


def _student_bytes(task: Distillation, job: _Job) -> tuple[int, int]:
    """What the weights of the student take as it trains, and what is remembered beside them."""
    source, run, coded = job.source, job.run, task.trains & {CODES, SCALES}
    skeleton = source.skeleton(torch.float32)
    plain = trained_parameters(skeleton, task.trains - coded) if task.trains - coded else {}
    whole = sum(each.numel() for each in plain.values())
    added, adapted = adapted_numbers(skeleton, task.adapters)
    dtype = dtype_of(run)
    loaded = load_dtype(source.stored_dtype, dtype)
    weights = memory_bytes(source, dtype, run.device)
    if dtype != torch.float32:
        # What is trained is held in fp32, beside its copy; what is adapted as it was loaded.
        weights += FLOAT_BYTES * whole + (loaded.itemsize - dtype.itemsize) * adapted
    if coded:
        # Released one after the other: each is given up for what it is trained as.
        numbers = coded_numbers(source, dtype)
        weights += numbers.bytes(coded) - numbers.packed_bytes
        whole += numbers.trained(coded)
    weights = max(weights, memory_bytes(source, loaded, run.device)) + FLOAT_BYTES * added
    # Each forward makes adapted matrices anew, and keeps them for the way back unless it is to recompute them.
    weights += 0 if job.options.recompute else dtype.itemsize * adapted
    best = FLOAT_BYTES if job.options.holdout else 0
    return weights, (BYTES_PER_TRAINED + best) * (whole + added)


def _by_layer(task: LayerDistillation | RouterFit | Rebalancing, job: _Job) -> dict[str, Any]:
    """Train, fit or rebalance one layer after the other."""
    source, run, writer, windows, options = job.source, job.run, job.writer, job.windows, job.options
    theirs = run.layers(job.teacher)
    ours = StreamedLayers(source, run.device, torch.float32, run.options.attn)
    kin = lineage(ours.model, theirs.model, job.edits)
    steps = options.steps if isinstance(task, LayerDistillation) else 1
    follow = LayerFollower(run.log, job.progress, source.num_layers, steps, windows.tokens)
    visitor = LayerVisitor(task, options, source, ours.model, kin, writer, run.options.seed, follow)
    if not writer.has(None):
        writer.copy(None)
    # A step then takes whole batches, and as many windows as it is told.
    most = min(windows_per_batch(windows), options.batch)
    size = next(n for n in range(most, 0, -1) if options.batch % n == 0)

    def visit(pair: LayerPair) -> None:
        visitor.visit(pair)
        job.spent.keep()

    walk_pairs(theirs, ours, kin, windows, visit, state=writer.scratch, size=size)
    notes = {i: read_json(visitor.notes_file(i)) for i in range(source.num_layers)}
    return {"layers": {i: note for i, note in notes.items() if note}}


class LayerVisitor:
    """Recovers one layer after the other and writes it."""

    def __init__(
        self,
        task: LayerDistillation | RouterFit | Rebalancing,
        options: TrainingOptions,
        source: Checkpoint,
        model: PreTrainedModel,
        kin: Lineage,
        writer: CheckpointWriter,
        seed: int,
        follow: LayerFollower,
    ) -> None:
        self.task, self.options, self.model, self.kin = task, options, model, kin
        self.writer, self.seed, self.prefix, self.follow = writer, seed, hf.layers_prefix(model), follow
        self.whole: list[str] = []
        self.adapted: list[str] = []
        if isinstance(task, LayerDistillation):
            self.whole = self._inside(trained_parameters(model, task.trains) if task.trains else ())
            self.adapted = self._inside(adapted_parameters(model, task.adapters.parts) if task.adapters else ())
            require_plain(source, [*self.whole, *self.adapted])

    def _inside(self, names: Iterable[str]) -> list[str]:
        """Those of parameters within the layers."""
        return [name for name in names if name.startswith(self.prefix)]

    def visit(self, pair: LayerPair) -> None:
        """One layer: recover it, write it, note what came of it."""
        self.follow.begin(pair.index)
        changed, note = self._recovered(pair)
        full = {f"{self.prefix}{pair.index}.{name}": tensor for name, tensor in changed.items()}
        self.writer.copy(pair.index, stored_tensors(self.model, full) if full else None)
        write_json(self.notes_file(pair.index), note)
        self.follow.end(note)

    def _recovered(self, pair: LayerPair) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The layer's changed tensors by their names in it, and what is to be reported."""
        if isinstance(self.task, RouterFit):
            return fit_router(pair, self.task, self.kin)
        if isinstance(self.task, Rebalancing):
            return rebalance(pair, self.task)
        trained = self._trained(pair, self.task)
        if not trained.parameters:
            return {}, {}
        report = train_layer(pair, self.task, trained, self.options, self.seed, self.follow.step)
        own = dict(pair.layer.named_parameters())
        return {name: own[name].detach() for name in trained.names}, report

    def _trained(self, pair: LayerPair, task: LayerDistillation) -> Trained:
        """What of a layer is trained, by names in it."""
        start, own = f"{self.prefix}{pair.index}.", dict(pair.layer.named_parameters())
        whole, adapted = (
            {name: each for name, each in own.items() if f"{start}{name}" in names}
            for names in (self.whole, self.adapted)
        )
        if task.adapters is None:
            return Trained(whole)
        return Trained(whole, adapters_on(adapted, task.adapters, self.seed + pair.index))

    def notes_file(self, index: int) -> Path:
        """What was reported of a layer."""
        return self.writer.scratch / f"notes-{index:05d}.json"
