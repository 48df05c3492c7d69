"""Checkpoints of a training that goes on: ordinary ones, in a folder beside the place of the final one.

out.steps/step-00050      the student after 50 steps; a folder of such a name is whole
out                       the final checkpoint, which is that of the last step
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.checkpoints.folder import begun_identity, clear_partial, read_manifest
from moe_compress.utils.folders import MADE, REMOVED, remove_folder

STEPS = ".steps"
NAME = re.compile(r"step-(\d{5,})")
# What a manifest says of the training that a checkpoint is of.
TRAINING = "training"


@dataclass(frozen=True)
class TrainingStep:
    """The checkpoint of a training after `step` of `steps` steps, over `tokens`.

    identity: the checkpoint's; run: that of the training, which is the final checkpoint's; base: what the manifest says
    of the original; losses: means over the steps since the checkpoint before.
    """

    folder: Path
    step: int
    steps: int
    tokens: int
    identity: str
    run: str
    base: dict[str, Any]
    losses: dict[str, float]

    @property
    def final(self) -> bool:
        """Whether it is the training's outcome."""
        return self.identity == self.run


def steps_folder(out: Path) -> Path:
    """Where the checkpoints of a training that leaves `out` are kept."""
    return out.with_name(out.name + STEPS)


def step_folder(out: Path, step: int) -> Path:
    """Where the one of that step is."""
    return steps_folder(out) / f"step-{step:05d}"


def training_step(folder: Path) -> TrainingStep | None:
    """What a checkpoint says of the training that it is of; None for a folder that is no finished one of such."""
    try:
        manifest = read_manifest(folder) or {}
    except ValueError:  # a file that came there otherwise
        return None
    said = manifest.get(TRAINING)
    if said is None or not (folder / "config.json").is_file():
        return None
    return TrainingStep(
        folder=folder,
        step=int(said["step"]),
        steps=int(said["steps"]),
        tokens=int(said["tokens"]),
        identity=str(manifest["identity"]),
        run=str(said["run"]),
        base=dict(manifest["base"]),
        losses={str(term): float(value) for term, value in said["losses"].items()},
    )


def finished_steps(out: Path) -> list[TrainingStep]:
    """Those that are there, by their steps; what is still being written, or being removed, is none."""
    folder = steps_folder(out)
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    found = [step for path in named if (step := training_step(path)) is not None]
    return sorted(found, key=lambda each: each.step)


def require_own_steps(out: Path, run: str) -> None:
    """Raise ValueError where checkpoints of another training stand: its steps would be taken for this one's."""
    if any(each.run != run for each in finished_steps(out)):
        raise ValueError(
            f"{steps_folder(out)} holds checkpoints of another training: move it away or remove it, or choose another "
            "out=."
        )


def rotate(out: Path, keep: int) -> None:
    """Remove all but the latest `keep` (0: none are removed); that of step 0, where a curve begins, stays."""
    later = [each for each in finished_steps(out) if each.step]
    for each in later[:-keep] if keep else []:
        remove_folder(each.folder)


def clear_unfinished(out: Path) -> None:
    """Remove what a killed run had begun to write or to remove."""
    folder = steps_folder(out)
    for path in [*folder.glob(f"step-*{MADE}")] if folder.is_dir() else []:
        if begun_identity(path) is not None:
            clear_partial(path)
            path.rmdir()
    for path in [*folder.glob(f"step-*{REMOVED}")] if folder.is_dir() else []:
        shutil.rmtree(path)
