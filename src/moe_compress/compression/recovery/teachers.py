"""Who a student is taught by: a model beside it, as it is or in few bits, what it said once, or nobody."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from moe_compress.checkpoints.load import memory_bytes
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.recovery.rounded_teacher import rounded_bytes, rounded_model, rounding_kl
from moe_compress.compression.recovery.teacher_cache import TeacherCache
from moe_compress.compression.recovery.teacher_pass import filled
from moe_compress.compression.recovery.whole_model import WholeModel
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import Progress
from moe_compress.engine.layers import Layers, ResidentLayers
from moe_compress.methods.recovery_method import Distillation
from moe_compress.run.context import Run
from moe_compress.utils.devices import dtype_name

# What is reported of a teacher in few bits: its divergence from the one that it was.
TEACHER_KL = "teacher_kl"


@dataclass(frozen=True, slots=True)
class Teaching:
    """online: runs beside the student; cache: what it said; report: what is to be said of either."""

    online: WholeModel | None = None
    cache: TeacherCache | None = None
    report: dict[str, Any] = field(default_factory=dict)


def teaching_of(
    task: Distillation, teacher: Checkpoint, windows: Windows, run: Run, progress: Progress | None
) -> Teaching:
    """What the task asks of its teacher, which is loaded only where it has to run."""
    if task.keeping is not None:
        cache = _kept(task, teacher, windows, run, progress)
        return Teaching(cache=cache, report={"kept": cache.report(), **cache.remembered})
    if task.terms.keys() == {"labels"}:
        return Teaching()
    if not task.teacher_bits:
        return Teaching(WholeModel(teacher, run, run.dtype))
    layers, kl = _rounded(task, teacher, windows, run)
    return Teaching(WholeModel(teacher, run, run.dtype, model=layers.model), report={TEACHER_KL: kl})


def online_bytes(task: Distillation, teacher: Checkpoint, run: Run) -> int:
    """What the teacher takes in memory beside the student."""
    if task.keeping is not None or task.terms.keys() == {"labels"}:
        return 0
    if task.teacher_bits:
        return rounded_bytes(teacher, task.teacher_bits)
    return memory_bytes(teacher, run.dtype, run.device)


def _kept(
    task: Distillation, teacher: Checkpoint, windows: Windows, run: Run, progress: Progress | None
) -> TeacherCache:
    """What the teacher says of the text, from disk."""
    assert task.keeping is not None
    said = {"teacher": teacher.fingerprint, "dtype": dtype_name(run.dtype), "attn": run.options.attn}
    said["bits"] = str(task.teacher_bits)
    cache = TeacherCache(run.results("teachers"), task.keeping, windows, said)

    def load() -> Layers:
        if not task.teacher_bits:
            return run.layers(teacher)
        layers, cache.about[TEACHER_KL] = _rounded(task, teacher, windows, run)
        return layers

    # The first process fills it for all, before any of them takes a step.
    return cache if run.processes.rank else filled(cache, load, teacher.name, progress)


def _rounded(task: Distillation, teacher: Checkpoint, windows: Windows, run: Run) -> tuple[ResidentLayers, float]:
    """The teacher in few bits, and its divergence from what it was."""
    layers = ResidentLayers(rounded_model(teacher, run.layers(teacher), task.teacher_bits))
    if run.processes.rank:  # the first says it for all
        return layers, math.nan
    return layers, float(f"{rounding_kl(run.layers(teacher), layers, windows):.6g}")
