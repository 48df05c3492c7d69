"""Evaluating the checkpoints of a training as they appear, beside it: none twice, none unfinished, none lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.steps import STEPS, TrainingStep, finished_steps, steps_folder, training_step
from moe_compress.evaluation.pair import original_for
from moe_compress.evaluation.quality.evaluate import protocol_of
from moe_compress.evaluation.tasks import selection
from moe_compress.evaluation.watching.best import best_of, keep_best, require_own_best
from moe_compress.evaluation.watching.evaluated import Evaluation, read_evaluations
from moe_compress.evaluation.watching.held import Held
from moe_compress.evaluation.watching.patience import Patience
from moe_compress.evaluation.watching.process import Evaluator, Found, Job
from moe_compress.evaluation.watching.watched import Watched, write_curve
from moe_compress.reports.record import now
from moe_compress.run.context import Run, start
from moe_compress.run.options import Options
from moe_compress.run.trackers import Kind, Tracker, open_tracker, require_tracker
from moe_compress.utils.files import one_at_a_time, require_writable
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

# How often a checkpoint is tried before a watch goes on without it.
ATTEMPTS = 3
Evaluate = Callable[[Job], Found]


@dataclass(frozen=True, kw_only=True)
class WatchWords:
    """How a training is watched; see `moe_compress.watch`."""

    tasks: str = ""
    limit: int | None = None
    every: int = 1
    best: str = ""
    once: bool = False
    poll: float = 10.0
    timeout: float = 3600.0
    original: str | None = None
    png: bool = False
    log: Kind = "jsonl"


def watch_training(folder: Path, words: WatchWords, options: Options) -> Watched:
    """Evaluate what there is and what comes, until the training has ended and all is evaluated; what was found.

    Raises ValueError for words that no checkpoint could be evaluated with, and where there will be none.
    """
    out = folder.with_name(folder.name.removesuffix(STEPS))
    place = Path(options.results) / "watch" / out.name
    require_writable(place, f"results={options.results}")
    require_tracker(words.log)
    if words.tasks:
        selection.version()
    _require_sense(words)
    patience = Patience(out, words.timeout)
    first = _first(out, words, patience)
    run, base = _run_beside(first, words, options)
    protocol = _protocol(base, run, words)
    with one_at_a_time(place / f"{protocol[:8]}.lock", f"watching {out.name}"), Evaluator(options.threads) as evaluator:
        return Watch(out, place, words, protocol, first.run, base, run, evaluator, patience).run_to_end()


def _require_sense(words: WatchWords) -> None:
    """Raise ValueError for times that cannot be waited."""
    for name, value in (("poll", words.poll), ("timeout", words.timeout)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}={value:g}: seconds, a number from 0 up, are needed.")


def _first(out: Path, words: WatchWords, patience: Patience) -> TrainingStep:
    """The first checkpoint that is there, once one is. ValueError where none will come."""
    said = False
    while True:
        # Asked first: what it left is there by then.
        ended, taken = patience.end(), out.exists() and (not out.is_dir() or any(out.iterdir()))
        held = [step for folder in steps_folder(out).glob("held-*/*") if (step := training_step(folder)) is not None]
        final = training_step(out)
        found = [*finished_steps(out), *held, *([final] if final is not None else [])]
        if found:
            return found[0]
        if words.once or taken or ended == "":
            raise ValueError(
                f"there is no checkpoint of a training in {steps_folder(out)}, nor is {out} what one from end to end "
                "left: name the out= of a recipe with distill or router_kd, and give that checkpoint_every=."
            )
        if ended:
            raise ValueError(f"there is no checkpoint in {steps_folder(out)}: {ended}")
        if not said:
            log.info("waiting for the first checkpoint in %s.", steps_folder(out))
            said = True
        time.sleep(words.poll)


def _run_beside(first: TrainingStep, words: WatchWords, options: Options) -> tuple[Run, Checkpoint]:
    """A run with the original's defaults, and the original."""
    base = original_for(open_checkpoint(first.folder), words.original)
    return start(options.model_copy(update={"model": base.name}).resolved()), base


def _protocol(base: Checkpoint, run: Run, words: WatchWords) -> str:
    """Identity of all that the numbers depend on besides the checkpoint. ValueError for tasks that there are not."""
    chosen = selection.choose(words.tasks) if words.tasks else []
    asked = {each.name: selection.identity(each, words.limit) for each in chosen}
    version = selection.version() if words.tasks else ""
    return fingerprint(base.fingerprint, protocol_of(base, run).values["id"], asked, words.limit, version)


@dataclass
class Watch:
    """The evaluations of one training (its identity) under one protocol.

    wait: how long to wait between two looks; failed: by identity of the checkpoint, how often, and until when it is
    left alone.
    """

    out: Path
    place: Path
    words: WatchWords
    protocol: str
    training: str
    base: Checkpoint
    run: Run
    evaluate: Evaluate
    patience: Patience
    wait: Callable[[float], None] = time.sleep
    failed: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = Held(self.out, self.protocol, self.training)
        self.written: list[TrainingStep] = []
        self.ended: str | None = None
        self.evaluations = {
            each.checkpoint: each
            for each in read_evaluations(self.place).values()
            if (each.protocol, each.run) == (self.protocol, self.training) and each.id == self._id(each.checkpoint)
        }

    def run_to_end(self) -> Watched:
        """Look, evaluate, wait; until nothing is left to be done, and (but with `once`) the training has ended."""
        if self.words.best:
            require_own_best(self.out, self.training)
        tracker = open_tracker(self.words.log, self.run.results("logs"), self.out.name, self.training, "evaluation")
        try:
            while True:
                self.ended = self.patience.end(self.training)  # asked first: what it left is there by then
                there = self.look()
                job = self.next_job(there)
                if job is not None:
                    self.do(*job, tracker)
                elif self.finished(there):
                    break
                else:
                    self.wait(self.words.poll)
        finally:
            if tracker is not None:
                tracker.close()
        self.held.close()
        return self.watched()

    def look(self) -> list[TrainingStep]:
        """The checkpoints that wait for their evaluation, by their steps, held until they have had it."""
        done = {key for key, each in self.evaluations.items() if not each.error}
        final = training_step(self.out)
        written = [*finished_steps(self.out), *([final] if final is not None else [])]
        self.written = [step for step in written if step.run == self.training]
        # Of a watch that was killed before it had, or that had asked for another metric.
        self._keep_best([*self.written, *self.held.steps()])
        for step in self.held.steps():
            if step.identity in done:
                self.held.release(step)
        wanted = [step for step in self.written if step.step % self.words.every == 0 or step.final]
        self.held.take([step for step in wanted if step.identity not in {*done, *self._given_up()}])
        return self.held.steps()

    def next_job(self, there: list[TrainingStep]) -> tuple[TrainingStep, bool] | None:
        """The next checkpoint, or any as a way to the original, which comes first; None while there is none to try."""
        wanted = [(step, True) for step in [*there, *self.written][:1]]
        wanted += [(step, False) for step in there]
        for step, of_original in wanted:
            key = self._key(step, of_original)
            attempts, until = self.failed.get(key, (0, 0.0))
            tried = attempts >= ATTEMPTS or time.monotonic() < until
            if not tried and (key not in self.evaluations or self.evaluations[key].error):
                return step, of_original
        return None

    def finished(self, there: list[TrainingStep]) -> bool:
        """Whether nothing that still is there is left to be tried again, and nothing more will come."""
        keys = {step.identity for step in there} | ({self.base.fingerprint} if there or self.written else set())
        waiting = any(attempts < ATTEMPTS for key, (attempts, _) in self.failed.items() if key in keys)
        return not waiting and (self.words.once or self.ended is not None or self.has_outcome())

    def has_outcome(self) -> bool:
        """Whether the training's outcome has had its evaluation."""
        return any(each.final for each in self.evaluations.values())

    def do(self, step: TrainingStep, of_original: bool, tracker: Tracker | None) -> None:
        """Evaluate one, and keep what was found, or what went wrong."""
        key = self._key(step, of_original)
        attempts = self.failed.get(key, (0, 0.0))[0] + 1
        log.info("evaluating %s.", self.base.name if of_original else f"step {step.step}")
        started, found, error = time.perf_counter(), Found(), ""
        try:
            found = self.evaluate(self._job(step, of_original))
        except (ValueError, OSError) as problem:
            error = str(problem)
            pause = self.words.poll * 2 ** (attempts - 1)
            self.failed[key] = attempts, time.monotonic() + pause
            log.warning("%s (attempt %d of %d): %s", step.folder, attempts, ATTEMPTS, error)
        else:
            self.failed.pop(key, None)
        evaluation = Evaluation(
            model=self.out.name, run=step.run, checkpoint=key, protocol=self.protocol, id=self._id(key), written=now(),
            step=None if of_original else step.step, final=step.final and not of_original,
            tokens=0 if of_original else step.tokens, losses={} if of_original else step.losses,
            seconds=round(time.perf_counter() - started, 3), attempts=attempts, error=error, **found,
        )  # fmt: skip
        self.evaluations[key] = evaluation
        path = evaluation.save(self.place)
        self.run.log.event("evaluated", step=evaluation.step, file=str(path), error=error, metrics=found.get("metrics"))
        if not error and not of_original:
            self._keep_best([step])
            self._track(evaluation, tracker)
        if not of_original and (not error or attempts == ATTEMPTS):
            self.held.release(step)
        write_curve(self.place, self.watched().evaluations, self.words.png)

    def watched(self) -> Watched:
        """What was found so far."""
        best = best_of(self.evaluations.values(), self.words.best) if self.words.best else None
        ended = "" if self.words.once or self.has_outcome() else self.ended or ""
        return Watched(self.out, self.place, list(self.evaluations.values()), self.words.best, best, ended)

    def _job(self, step: TrainingStep, of_original: bool) -> Job:
        # Of the options those of the run, but for the model, which is the checkpoint itself.
        options = {key: value for key, value in self.run.options.model_dump().items() if key != "model"}
        return Job(
            folder=step.folder, of_original=of_original, original=self.words.original, options=options,
            tasks=self.words.tasks, limit=self.words.limit, place=self.place,
        )  # fmt: skip

    def _key(self, step: TrainingStep, of_original: bool) -> str:
        return self.base.fingerprint if of_original else step.identity

    def _id(self, checkpoint: str) -> str:
        return fingerprint(checkpoint, self.protocol)

    def _given_up(self) -> set[str]:
        return {key for key, (attempts, _) in self.failed.items() if attempts >= ATTEMPTS}

    def _keep_best(self, at_hand: list[TrainingStep]) -> None:
        best = best_of(self.evaluations.values(), self.words.best) if self.words.best else None
        folders = {step.identity: step.folder for step in at_hand}
        if best is not None and best.checkpoint in folders:
            keep_best(self.out, best, folders[best.checkpoint])

    def _track(self, evaluation: Evaluation, tracker: Tracker | None) -> None:
        if tracker is not None and evaluation.step is not None:
            values: Mapping[str, float] = {name: each["value"] for name, each in evaluation.metrics.items()}
            tracker.log(evaluation.step, values)
