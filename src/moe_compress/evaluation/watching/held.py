"""Checkpoints that wait for their evaluation, by hard links: rotation may remove them meanwhile."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from moe_compress.checkpoints.steps import NAME, TrainingStep, steps_folder, training_step
from moe_compress.utils.folders import link_folder, remove_folder
from moe_compress.utils.logging import log


class Held:
    """The links of one watch, in a folder of its own among the steps; those of a killed one are taken up."""

    def __init__(self, out: Path, protocol: str, training: str) -> None:
        self.out, self.training = out, training
        self.folder = steps_folder(out) / f"held-{protocol[:8]}"

    def take(self, wanted: Iterable[TrainingStep]) -> None:
        """Link these, but for those that are."""
        there = {each.identity for each in self.steps()}
        for each in wanted:
            if each.identity not in there:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    link_folder(each.folder, self.place(each.step))
                except FileNotFoundError:
                    log.warning(
                        "step %d was removed before it could be held: keep more (keep_checkpoints=).", each.step
                    )

    def place(self, step: int) -> Path:
        """Where the links of a step are: named by the training too, as records are by their folders."""
        return self.folder / f"{self.out.name}-step-{step:05d}"

    def steps(self) -> list[TrainingStep]:
        """Those of the training that are held, by their steps; any other that is in their place goes."""
        whole = re.compile(re.escape(f"{self.out.name}-") + NAME.pattern)
        paths = [*self.folder.iterdir()] if self.folder.is_dir() else []
        found = {path: training_step(path) for path in paths if whole.fullmatch(path.name)}
        for path in (path for path, step in found.items() if step is None or step.run != self.training):
            remove_folder(path)
        ours = [step for step in found.values() if step is not None and step.run == self.training]
        return sorted(ours, key=lambda each: each.step)

    def release(self, step: TrainingStep) -> None:
        """Hold it no longer."""
        if step.folder.parent == self.folder:
            remove_folder(step.folder)

    def close(self) -> None:
        """Leave no folder where nothing is held, nor that of the steps where nothing else is in it."""
        if self.folder.is_dir() and not self.steps():
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()
