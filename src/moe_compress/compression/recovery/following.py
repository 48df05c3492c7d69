"""What is told of a training while it goes on: the run's log, a progress bar, and a tracker where one was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from moe_compress.checkpoints.steps import TRAINING
from moe_compress.compression.recovery.trained_weights import schedule
from moe_compress.compression.recovery.training_state import Curve
from moe_compress.engine.forward import Progress
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.run.log import RunLog
from moe_compress.run.progress import Bar
from moe_compress.run.trackers import Tracker

# Called with the curve so far before the first step of a run, and behind every one.
Follow = Callable[[Curve], None]


class Follower:
    """Tells of every step: its losses, tokens per second, learning rate; then what else is to be done behind it."""

    def __init__(
        self,
        options: TrainingOptions,
        log: RunLog,
        tracker: Tracker | None,
        progress: Progress | None,
        then: Follow | None = None,
    ) -> None:
        self.options, self.log, self.tracker, self.progress, self.then = options, log, tracker, progress, then
        self.tokens, self.seconds = 0, 0.0
        self.began: int | None = None

    def __call__(self, curve: Curve) -> None:
        """Tell of the last step of the curve; of none, where that is one of an earlier run."""
        if self.began is None:
            self.began = curve.steps
        else:
            self._tell(curve)
        self.tokens, self.seconds = curve.tokens, curve.seconds
        if self.then is not None:
            self.then(curve)

    def _tell(self, curve: Curve) -> None:
        step, losses = curve.steps, curve.last
        speed = (curve.tokens - self.tokens) / max(curve.seconds - self.seconds, 1e-9)
        rate = self.options.lr * schedule(step - 1, self.options)
        self.log.event(
            "step", step=step, tokens=curve.tokens, tokens_per_second=round(speed, 1), lr=rate, losses=losses
        )
        if self.tracker is not None:
            self.tracker.log(step, {**losses, "tokens": curve.tokens, "tokens_per_second": speed, "lr": rate})
        _show(self.progress, "training", losses, speed, step, self.options.steps)


class LayerFollower:
    """Tells of a recovery that goes from layer to layer: what came of each, and, on the bar, of the steps within.

    layers: how many there are; steps: in each; tokens: of the text.
    """

    def __init__(self, log: RunLog, progress: Progress | None, layers: int, steps: int, tokens: int) -> None:
        self.log, self.progress = log, progress
        self.layers, self.steps, self.tokens = layers, steps, tokens

    def begin(self, layer: int) -> None:
        """A layer is about to be recovered."""
        self.layer, self.started = layer, time.perf_counter()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """So many of its steps were taken, over so many tokens, the last one with this loss."""
        done = self.layer * self.steps + step
        _show(self.progress, self._title, {"error": loss}, self._speed(tokens), done, self.layers * self.steps)

    def end(self, note: Mapping[str, Any]) -> None:
        """It is recovered; note: what is reported of it, pairs of before and after among it."""
        speed = self._speed(note.get("tokens", self.tokens))
        if note:
            self.log.event("layer", **{"layer": self.layer, "tokens_per_second": round(speed, 1), **note})
        after = {name: each[1] for name, each in note.items() if isinstance(each, list)}
        _show(self.progress, self._title, after, speed, (self.layer + 1) * self.steps, self.layers * self.steps)

    @property
    def _title(self) -> str:
        return f"layer {self.layer + 1} of {self.layers}"

    def _speed(self, tokens: int) -> float:
        return tokens / max(time.perf_counter() - self.started, 1e-9)


def _show(
    progress: Progress | None, what: str, losses: Mapping[str, float], speed: float, done: int, total: int
) -> None:
    """Move the bar, with losses and tokens per second behind it."""
    if isinstance(progress, Bar):
        said = [*(f"{term} {value:.4g}" for term, value in losses.items()), f"{speed:,.0f} tokens/s"]
        progress.say(what, ", ".join(said))
    if progress is not None:
        progress(done, total)


def before_and_after(report: Mapping[str, Any]) -> str:
    """Of what a recovery reports: its losses at the first step and the last, or before and after, means over layers."""
    if TRAINING in report:
        found = {term: [(values[0], values[-1])] for term, values in report[TRAINING]["curve"].items()}
    else:
        notes = report["layers"].values()
        names = dict.fromkeys(name for note in notes for name, each in note.items() if isinstance(each, list))
        found = {name: [note[name] for note in notes if name in note] for name in names}
    means = {name: [fmean(side) for side in zip(*pairs, strict=True)] for name, pairs in found.items()}
    return ", ".join(f"{name} {first:.4g} -> {last:.4g}" for name, (first, last) in means.items())
