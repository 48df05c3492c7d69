"""The best checkpoint of a training by one metric, kept beside it under a name of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_compress.checkpoints.steps import training_step
from moe_compress.evaluation.watching.evaluated import Evaluation
from moe_compress.utils.folders import link_folder, remove_folder, replace_folder
from moe_compress.utils.logging import log

BEST = ".best"
# Metrics of which less is better, and those whose names begin so (perplexity_code); of all others more is.
LESS = ("perplexity", "nll", "delta_nll", "kl", "task_flips", "routing_kl", "routing_flips")


def best_folder(out: Path) -> Path:
    """Where the best checkpoint of a training that leaves `out` is kept."""
    return out.with_name(out.name + BEST)


def best_of(evaluations: Iterable[Evaluation], metric: str) -> Evaluation | None:
    """The best checkpoint's; of equally good ones the earliest step's. ValueError for a metric that none has."""
    measured = [each for each in evaluations if each.step is not None and not each.error]
    found = [each for each in measured if metric in each.metrics]
    if measured and not found:
        raise ValueError(f"best={metric}: the evaluations have {', '.join(measured[0].metrics)}.")
    less = any(metric == name or metric.startswith(f"{name}_") for name in LESS)

    def rank(each: Evaluation) -> tuple[float, int]:
        value = float(each.metrics[metric]["value"])
        return (value if less else -value), each.step or 0

    return min(found, key=rank, default=None)


def require_own_best(out: Path, run: str) -> None:
    """Raise ValueError for a folder in that place that is no checkpoint of this training."""
    folder = best_folder(out)
    if folder.exists():
        there = training_step(folder)
        if there is None or there.run != run:
            raise ValueError(f"{folder} holds something else than a checkpoint of this training: move it away.")


def keep_best(out: Path, best: Evaluation, folder: Path) -> None:
    """Put the best checkpoint, which is in `folder`, into its place, by hard links and at once, if it is not there."""
    target = best_folder(out)
    there = training_step(target)
    if there is not None and there.identity == best.checkpoint:
        return
    new = target.with_name(target.name + ".new")
    if new.exists():  # of a watch that was killed
        remove_folder(new)
    try:
        link_folder(folder, new)
    except FileNotFoundError as error:
        log.warning("%s, the best so far, is not kept: %s", best.title, error)
        return
    replace_folder(new, target)
    log.info("%s is the best so far: %s.", best.title, target)
