"""Trainings that several processes carry out: the first gives the order, the others take part until it is through.

The first alone runs the recipe, fills caches, writes and says anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.compression.recovery.checks import task_of
from moe_compress.compression.recovery.teachers import teaching_of
from moe_compress.compression.recovery.training_state import Curve
from moe_compress.compression.recovery.whole_training import changed_by_layer, training_of
from moe_compress.data.windows import Windows
from moe_compress.edits.edits import Edit
from moe_compress.methods.recovery_method import Distillation
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import Options
from moe_compress.run.processes import Processes


@dataclass(frozen=True, slots=True)
class Order:
    """All that a training depends on; folders are where every process finds them.

    student, teacher: folder and name of a checkpoint; edits: those between the two; state: what is kept of it.
    """

    stage: Stage
    student: tuple[Path, str]
    teacher: tuple[Path, str]
    edits: Sequence[Edit]
    windows: Windows
    options: Options
    state: Path


def address(checkpoint: Checkpoint) -> tuple[Path, str]:
    """Where another process finds a checkpoint, and what it is called."""
    return checkpoint.folder.absolute(), checkpoint.name


def assist(processes: Processes) -> None:
    """Take part in every training that the first process gives an order for, until it is through."""
    while (order := processes.first()) is not None:
        _take_part(order, processes)


def _take_part(order: Order, processes: Processes) -> None:
    started = time.process_time()
    run = Run(order.options, RunLog(None), processes)
    task, options = task_of(order.stage), TrainingOptions.of(order.stage.parameters)
    assert isinstance(task, Distillation)
    with processes.together():
        student, teacher = (_opened(*each) for each in (order.student, order.teacher))
        teaching = teaching_of(task, teacher, order.windows, run, None)
        training = training_of(task, options, student, teaching, order.edits, order.windows, run)

    def follow(_curve: Curve) -> None:
        """The other side of what the first process does where it writes the student so far."""
        if options.checkpoint_every and processes.mesh is not None and processes.first():
            changed_by_layer(student, training)

    training.run(order.state, follow)
    if processes.mesh is not None:
        changed_by_layer(student, training)
    processes.all_say(time.process_time() - started)


def _opened(folder: Path, name: str) -> Checkpoint:
    """ValueError where this process does not see what the first one does."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: all processes need the same folders (out=, results=, the model's).")
    return open_checkpoint(folder, name)
