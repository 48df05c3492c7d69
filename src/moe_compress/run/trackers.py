"""Where curves are shown besides the run's log: Weights & Biases or TensorBoard, imported where they are asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["jsonl", "wandb", "tensorboard"]
PROJECT = "moe-compress"
# By the kind, the module that it needs.
MODULES: dict[str, str] = {"wandb": "wandb", "tensorboard": "tensorboard"}


class Tracker(Protocol):
    """Shows numbers over steps, which may come in any order."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""

    def close(self) -> None:
        """Write out what is left."""


def require_tracker(kind: Kind) -> None:
    """Raise ValueError for one whose package is not installed."""
    module = MODULES.get(kind)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ValueError(f"log={kind} needs {module}, which is not installed: pip install 'moe-compress[{kind}]'.")


def open_tracker(kind: Kind, folder: Path, name: str, identity: str, part: str) -> Tracker | None:
    """The one of that kind, which leaves its files in `folder`; None for `jsonl`, the log that every run has.

    name: of the run; identity: the same for what goes on in another process; part: of the run, `training` say.
    """
    require_tracker(kind)
    if kind == "jsonl":
        return None
    made = _WeightsAndBiases if kind == "wandb" else _TensorBoard
    return made(folder, name, identity, part)


class _WeightsAndBiases:
    """A run of wandb a part, in one group; steps are a number of their own, since wandb's own only ever grow."""

    def __init__(self, folder: Path, name: str, identity: str, part: str) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.part = part
        self.run: Any = wandb.init(
            project=PROJECT, name=f"{name} {part}", id=f"{identity}-{part}", group=name, dir=str(folder), resume="allow"
        )
        self.run.define_metric(f"{part}/step")
        self.run.define_metric(f"{part}/*", step_metric=f"{part}/step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{self.part}/step": step, **{f"{self.part}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, name: str, identity: str, part: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.part = part
        self.writer: Any = SummaryWriter(str(folder / "tensorboard" / f"{name}-{identity[:6]}"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(f"{self.part}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()
