"""The student so far as an ordinary checkpoint, every so many steps of a training; the oldest go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.steps import clear_unfinished, finished_steps, rotate, step_folder
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.utils.hashing import fingerprint

# Given a writer whose tensors are all written, and what is reported of the training so far, makes a checkpoint of it.
Finish = Callable[[CheckpointWriter, Mapping[str, Any]], None]


@dataclass(frozen=True)
class StepCheckpoints:
    """Those of one training that leaves `out`; `run` is the identity of what it leaves.

    every: steps between two (0: none are written); keep: of the latest (0: all).
    """

    out: Path
    source: Checkpoint
    run: str
    every: int
    keep: int
    finish: Finish

    def begin(self) -> None:
        """Remove what a killed run left unfinished, or had still to remove."""
        if self.every:
            clear_unfinished(self.out)
            rotate(self.out, self.keep)

    def due(self, step: int, steps: int) -> bool:
        """Whether that of this step is to be written, and a run that was killed later has not done so.

        That of the last step is what the training leaves.
        """
        if not self.every or step % self.every or step == steps:
            return False
        return step > max((each.step for each in finished_steps(self.out)), default=-1)

    def left(self) -> str:
        """What a training that came to nothing leaves, in a sentence."""
        last = max(finished_steps(self.out), key=lambda each: each.step, default=None)
        return "Nothing is written." if last is None else f"The last checkpoint is {last.folder}."

    def write(self, step: int, fill: Callable[[CheckpointWriter], None], report: Mapping[str, Any]) -> None:
        """Write the one of this step. fill: writes all tensors."""
        writer = CheckpointWriter(step_folder(self.out, step), self.source, fingerprint(self.run, step))
        fill(writer)
        self.finish(writer, report)
        rotate(self.out, self.keep)
