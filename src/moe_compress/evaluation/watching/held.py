"""Checkpoints that wait for their evaluation, by hard links: rotation may remove them meanwhile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from moe_compress.checkpoints.steps import NAME, TrainingStep, finished_steps, steps_folder, training_step
from moe_compress.utils.folders import link_folder, remove_folder
from moe_compress.utils.logging import log


class Held:
    """The links of one watch, in a folder of its own among the steps; those of a killed one are taken up."""

    def __init__(self, out: Path, protocol: str) -> None:
        self.out = out
        self.folder = steps_folder(out) / f"held-{protocol[:8]}"

    def take(self, every: int, done: Collection[str]) -> None:
        """Link what is finished and wanted, but for checkpoints (identities) that are done."""
        there = {each.identity for each in self.steps()}
        for each in finished_steps(self.out):
            if each.step % every == 0 and each.identity not in {*there, *done}:
                try:
                    self.folder.mkdir(exist_ok=True)
                    link_folder(each.folder, self.place(each.step))
                except FileNotFoundError:
                    log.warning(
                        "step %d was removed before it could be held: keep more (keep_checkpoints=).", each.step
                    )

    def place(self, step: int) -> Path:
        """Where the links of a step are: named by the training too, as records are by their folders."""
        return self.folder / f"{self.out.name}-step-{step:05d}"

    def steps(self) -> list[TrainingStep]:
        """Those that are held, by their steps."""
        whole = re.compile(re.escape(f"{self.out.name}-") + NAME.pattern)
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [step for path in paths if whole.fullmatch(path.name) and (step := training_step(path)) is not None]
        return sorted(found, key=lambda each: each.step)

    def release(self, step: TrainingStep) -> None:
        """Hold it no longer."""
        if step.folder.parent == self.folder:
            remove_folder(step.folder)

    def close(self) -> None:
        """Leave no folder where nothing is held."""
        if self.folder.is_dir() and not self.steps():
            shutil.rmtree(self.folder)
