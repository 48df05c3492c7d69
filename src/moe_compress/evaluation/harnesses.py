"""The harnesses as Python functions: each measures a checkpoint and keeps what it found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.evaluation.flops import report as flops_report
from moe_compress.evaluation.flops.report import FlopsReport
from moe_compress.evaluation.pair import open_pair, original_for
from moe_compress.evaluation.routing.report import RoutingReport, routing_report
from moe_compress.evaluation.speed.report import SpeedReport, setting_of, speed_report
from moe_compress.evaluation.tasks import lm_eval_runner
from moe_compress.evaluation.tasks.report import TaskReport, questions_of, task_report
from moe_compress.evaluation.verification import verify as verification
from moe_compress.evaluation.verification.verify import Verification
from moe_compress.utils.devices import threads
from moe_compress.utils.files import require_writable


def routing(checkpoint: str | Path, /, original: str | Path | None = None, **options: Any) -> RoutingReport:
    """How far a checkpoint routes otherwise than its original: on its own hidden states, and on the original's."""
    opened, base, run = open_pair(checkpoint, original, options, "routing")
    with threads(run.options.threads):
        report = routing_report(opened, base, run)
    report.save(run.results("routing"))
    return report


def speed(checkpoint: str | Path, /, original: str | Path | None = None, **setting: Any) -> SpeedReport:
    """How fast a checkpoint runs beside its original, and what memory it takes; each in a process of its own.

    prompts, batches: numbers separated by commas; tokens: decoded behind a prompt; runs, seconds: how long each is
    timed, at least; starts: of both processes; quick: one short point; dtype, device, threads, results: as everywhere.
    """
    results = Path(setting.pop("results", "runs"))
    opened = resolve_model(str(checkpoint))
    base, asked = original_for(opened, original), setting_of(**_known(setting, setting_of, "speed", "original"))
    require_writable(results / "speed", f"results={results}")
    report = speed_report(opened, base, asked)
    report.save(results / "speed")
    return report


def _known(given: dict[str, Any], function: Callable[..., Any], command: str, *others: str) -> dict[str, Any]:
    """The words, if the function takes them all. others: what the command takes besides results=."""
    every = inspect.signature(function).parameters.values()
    known = [each.name for each in every if each.kind is not each.POSITIONAL_ONLY]
    for key in given:
        if key not in known:
            raise ValueError(f"{command} has no option {key!r}; it takes: {', '.join([*known, *others, 'results'])}.")
    return given


def tasks(
    checkpoint: str | Path,
    /,
    tasks: str | Sequence[str] = "local",
    original: str | Path | None = None,
    *,
    limit: int | str | None = None,
    batch: int | str = lm_eval_runner.BATCH,
    fewshot: int | str = 0,
    **options: Any,
) -> TaskReport:
    """Accuracy of a checkpoint on tasks of lm_eval beside its original's, paired document by document.

    tasks: `local` (no network), `paper` (its eight), names of lm_eval, paths of .yaml files, joined by commas; limit:
    documents of a task; batch: prompts at once; fewshot: examples in a prompt.
    """
    questions_of(limit, batch, fewshot)
    opened, base, run = open_pair(checkpoint, original, options, "tasks")
    with threads(run.options.threads):
        report = task_report(opened, base, run, tasks, limit=limit, batch=batch, fewshot=fewshot)
    report.save(run.results("tasks"))
    return report


def flops(model: str | Path, /, results: str | Path = "runs", **words: Any) -> FlopsReport:
    """Count a model's FLOPs, parameters and bytes by component, from its config alone: see flops_report.flops."""
    known = _known(words, flops_report.flops, "flops")
    require_writable(Path(results) / "flops", f"results={results}")
    report = flops_report.flops(model, **known)
    report.save(Path(results) / "flops")
    return report


def verify(checkpoint: str | Path, /, results: str | Path = "runs") -> Verification:
    """Load a checkpoint by stock transformers in a fresh process, compare logits, generate; who can load it, and why.

    Its `problems` are empty where all is well.
    """
    opened = resolve_model(str(checkpoint))
    require_writable(Path(results) / "verification", f"results={results}")
    found = verification.verify(opened)
    found.save(Path(results) / "verification")
    return found
