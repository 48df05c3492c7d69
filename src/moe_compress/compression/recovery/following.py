"""What is told of a training while it goes on: the run's log, a progress bar, and a tracker where one was asked for."""

from __future__ import annotations

from collections.abc import Callable

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
        held = {"holdout": curve.held[step]} if step in curve.held else {}
        speed = (curve.tokens - self.tokens) / max(curve.seconds - self.seconds, 1e-9)
        rate = self.options.lr * schedule(step - 1, self.options)
        self.log.event(
            "step", step=step, tokens=curve.tokens, tokens_per_second=round(speed, 1), lr=rate, losses=losses, **held
        )
        if self.tracker is not None:
            self.tracker.log(step, {**losses, **held, "tokens": curve.tokens, "tokens_per_second": speed, "lr": rate})
        if self.progress is not None:
            if isinstance(self.progress, Bar):
                said = ", ".join(f"{term} {value:.4g}" for term, value in losses.items())
                self.progress.say("training", f"{said}, {speed:,.0f} tokens/s")
            self.progress(step, self.options.steps)
