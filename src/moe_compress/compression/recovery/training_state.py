"""What a training run remembers, so that a killed one goes on: weights, moments, and the curve up to there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.utils.files import read_json, write_json
from moe_compress.utils.logging import log

# A curve is reported by at most so many of its steps.
SHOWN = 40
TOKENS, SECONDS, LOSSES, HELD = "curve|tokens", "curve|seconds", "curve|loss|", "curve|held"


class DivergedError(ValueError):
    """A training whose loss is no number any more."""


@dataclass
class Curve:
    """Losses by term of every step so far, the tokens that it saw, and the seconds that all of it took.

    held: by steps taken, the whole loss on windows that are held aside, where it was measured.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    held: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return max(map(len, self.losses.values()), default=0)

    @property
    def last(self) -> dict[str, float]:
        """The losses of the last step; nothing before the first."""
        return {term: values[-1] for term, values in self.losses.items() if values}

    def add(self, step: int, losses: Mapping[str, float], tokens: int) -> None:
        """Enter a step. DivergedError for a loss that is no number."""
        wrong = next((term for term, value in losses.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise DivergedError(
                f"the loss ({wrong}) of step {step + 1} is no number: a lower lr= helps, or a longer warmup=."
            )
        for term, value in losses.items():
            self.losses.setdefault(term, []).append(value)
        self.tokens += tokens

    def recent(self, every: int) -> dict[str, float]:
        """Mean losses since the checkpoint before, where one is written after `every` steps (0: since the first)."""
        start = (self.steps - 1) // every * every if every else 0
        return {term: float(f"{fmean(values[start:]):.6g}") for term, values in self.losses.items() if values}

    def report(self, every: int) -> dict[str, Any]:
        """Tokens, seconds, the losses at evenly spaced steps, the first and the last among them, and recent ones."""
        count = self.steps
        at = sorted({round(n * (count - 1) / (SHOWN - 1)) for n in range(SHOWN)}) if count else []
        curve = {term: [float(f"{values[n]:.6g}") for n in at] for term, values in self.losses.items()}
        return {
            "tokens": self.tokens, "seconds": round(self.seconds, 3), "steps": count,
            "curve_steps": [n + 1 for n in at], "curve": curve, "recent": self.recent(every),
        }  # fmt: skip


class Spent:
    """Processor seconds since it was made, and those of processes before that were killed, from a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.started = file, time.process_time()
        self.before: float = read_json(file)["processor_seconds"] if file.is_file() else 0.0

    @property
    def seconds(self) -> float:
        """All of them so far."""
        return self.before + time.process_time() - self.started

    def keep(self) -> None:
        """Let a later process know of them."""
        write_json(self.file, {"processor_seconds": self.seconds})


def save(file: Path, optimiser: Optimiser, curve: Curve, *, writes: bool = True) -> None:
    """Keep all that the next step depends on, in one file that is written as a whole.

    Of several processes, all put it together, and one writes it.
    """
    losses = {f"{LOSSES}{term}": torch.tensor(each, dtype=torch.float64) for term, each in curve.losses.items()}
    numbers = {TOKENS: torch.tensor(curve.tokens), SECONDS: torch.tensor(curve.seconds, dtype=torch.float64)}
    if curve.held:
        numbers[HELD] = torch.tensor([*curve.held.items()], dtype=torch.float64)
    state = optimiser.state()
    if writes:
        write_shard(file, {**state, **losses, **numbers})


def resume(file: Path, optimiser: Optimiser) -> Curve:
    """Put back what `save` kept; an empty curve where there is nothing, or nothing whole."""
    if not file.is_file():
        return Curve()
    try:
        kept = load_file(file)
    except SafetensorError:
        return Curve()
    curve = Curve(tokens=int(kept.pop(TOKENS)), seconds=float(kept.pop(SECONDS)))
    if HELD in kept:
        curve.held = {int(step): loss for step, loss in kept.pop(HELD).tolist()}
    for key in [key for key in kept if key.startswith(LOSSES)]:
        curve.losses[key.removeprefix(LOSSES)] = kept.pop(key).tolist()
    optimiser.restore(kept)
    log.info("going on behind step %d, as an earlier run was stopped.", curve.steps)
    return curve
