"""The tasks harness: both models asked the same, and the report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.load import load_as_run, require_memory
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.evaluation.harnesses import harness
from moe_compress.evaluation.pair import open_pair
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.evaluation.tasks import lm_eval_runner, selection
from moe_compress.evaluation.tasks.lm_eval_runner import BATCH, TaskAnswers
from moe_compress.evaluation.tasks.selection import SelectedTask
from moe_compress.models import hf
from moe_compress.reports import table_formats
from moe_compress.reports.table import SAME
from moe_compress.reports.table_formats import Cells
from moe_compress.run.context import Run
from moe_compress.run.option_uses import ARITHMETIC, MODEL
from moe_compress.run.progress import progress_bar
from moe_compress.utils.choices import AtLeast, Means
from moe_compress.utils.devices import dtype_name, threads
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

LEAST_P = 0.05
MEANING = (
    "Accuracy with Wilson's 95 % interval; acc_norm: likelihoods are divided by the length of the choice. Chance: of "
    "blind guesses. Change: paired by document, bootstrapped over documents. Lost: right in the original alone; "
    "gained: in the model alone; p: McNemar's exact test of the two. Average: the plain mean of the tasks."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A row for each task, their average, and what the columns mean."""
    rows = [_row(name, found) for name, found in report["tasks"].items()]
    if report["average"]:
        rows.append(_row("average", report["average"]))
    beside = f" beside {report['original']}" if "model" in rows[0] else ""
    table = table_formats.markdown(Cells.of(rows))
    return "\n\n".join([f"### {report['model']}{beside}", _settings(report["settings"]), table, MEANING]) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    asked = f"the first {settings['limit']} documents" if settings["limit"] else "all documents"
    how = f"{settings['dtype']} on {settings['device']}, {settings['attn']} attention"
    return f"{settings['fewshot']}-shot, {asked}, {how}, lm_eval {settings['lm_eval']}"


def _row(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    row = {"task": name}
    if "metric" in found:
        chance = "" if found["chance"] is None else f"{found['chance']:.3f}"
        row |= {"metric": found["metric"], "documents": f"{found['documents']:,}", "chance": chance}
    row["original"] = _metric(found["before"])
    if "after" in found:
        row |= {"model": _metric(found["after"]), "change": _change(found["delta"], found.get("p", 0.0))}
    if "lost" in found:
        row |= {"lost": f"{found['lost']}", "gained": f"{found['gained']}", "p": f"{found['p']:.2g}"}
    return row


def _metric(found: Mapping[str, Any], sign: str = "") -> str:
    return table_formats.with_interval(found["value"], found["interval"], f"{sign}.3f")


def _change(found: Mapping[str, Any], p: float) -> str:
    """Detectable only where interval and test agree that it is: of few documents the interval alone says too much."""
    ends = found["interval"]
    nothing = ends is not None and (ends[0] <= 0 <= ends[1] or p > LEAST_P)
    return _metric(found, "+") + (f", {SAME}" if nothing else "")


@dataclass(frozen=True)
class TaskReport(SavedReport):
    """Accuracy of the original (`before`) and of a model (`after`, unless it is the original), and the change.

    tasks: by name; average: of several tasks; settings: what else the numbers depend on; id: of all of it.
    """

    model: str
    original: str
    fingerprint: str
    original_fingerprint: str
    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    average: dict[str, Any] | None
    id: str

    def markdown(self) -> str:
        """A row for each task, and their average."""
        return as_markdown(self.to_json())


AT_LEAST = "a number from {least} is needed."


@harness("tasks", columns="moe_compress.evaluation.tasks.columns", options=(*ARITHMETIC, *MODEL, "results"))
def tasks(
    checkpoint: str | Path,
    /,
    tasks: str | Sequence[str] = "local",
    original: Annotated[str | None, Means("none: the one that it was made from")] = None,
    *,
    limit: Annotated[Annotated[int, AtLeast(1, AT_LEAST)] | None, Means("none: all")] = None,
    batch: Annotated[int, AtLeast(1, AT_LEAST)] = BATCH,
    fewshot: Annotated[int, AtLeast(0, AT_LEAST)] = 0,
    **options: Any,
) -> TaskReport:
    """Accuracy of a checkpoint on tasks of lm_eval beside its original's, paired document by document.

    tasks: `local` (no network), `paper` (its eight), names of lm_eval, paths of .yaml files, joined by commas; limit:
    documents of a task (of a group: of each part); batch: prompts at once; fewshot: examples in a prompt.
    """
    opened, base, run = open_pair(checkpoint, original, options, "tasks")
    with threads(run.options.threads):
        return task_report(opened, base, run, tasks, limit=limit, batch=batch, fewshot=fewshot)


def task_report(
    checkpoint: Checkpoint,
    base: Checkpoint,
    run: Run,
    tasks: str | Sequence[str] = "local",
    *,
    limit: int | None = None,
    batch: int = BATCH,
    fewshot: int = 0,
) -> TaskReport:
    """Ask both models the same; what either was asked before, in the same arithmetic, is read back.

    Raises ValueError, before weights are read, for tasks that cannot be run here, and for models that do not fit into
    memory.
    """
    chosen = selection.choose(tasks, fewshot)
    for each in (base, checkpoint):
        run.tokenizer(each)
    settings = {
        "limit": limit,
        "fewshot": fewshot,
        "dtype": dtype_name(run.dtype),
        "device": run.device.type,
        "attn": run.options.attn or hf.skeleton(base.config, run.dtype).config._attn_implementation,
        "lm_eval": selection.version(),
    }
    asked = {each.name: selection.identity(each, limit) for each in chosen}
    before = _answers(base, Path(base.name).name, chosen, asked, settings, run, batch)
    if checkpoint.folder == base.folder:
        return _report(checkpoint, base, chosen, asked, settings, before, None)
    after = _answers(checkpoint, checkpoint.folder.name, chosen, asked, settings, run, batch)
    return _report(checkpoint, base, chosen, asked, settings, before, after)


def _answers(
    checkpoint: Checkpoint,
    title: str,
    chosen: Sequence[SelectedTask],
    asked: dict[str, str],
    settings: dict[str, Any],
    run: Run,
    batch: int,
) -> dict[str, TaskAnswers]:
    """Kept ones, and new ones of tasks that are missing, kept from now on: a folder a model, a file a task."""
    paths = {}
    words = [path.read_bytes() for path in sorted(checkpoint.folder.glob("tokenizer*")) if path.is_file()]
    for name, questions in asked.items():
        key = fingerprint(checkpoint.fingerprint, settings, questions, *words)[:8]
        task = re.sub(r"[^\w.-]+", "-", name)
        paths[name] = run.results("tasks") / title / f"{task}-{key}.safetensors"
    missing = [each for each in chosen if not paths[each.name].is_file()]
    if missing:
        log.info("asking %s: %s.", checkpoint.name, ", ".join(each.name for each in missing))
        tokenizer = run.tokenizer(checkpoint)
        model, limit = _loaded(checkpoint, run), settings["limit"]
        with progress_bar("asking") as progress:
            found = lm_eval_runner.run_tasks(model, tokenizer, missing, batch=batch, limit=limit, progress=progress)
        for each in missing:
            about = {**settings, "model": checkpoint.fingerprint, "task": each.name, "metric": each.metric}
            lm_eval_runner.save_scores(paths[each.name], found[each.name], about)
    return {name: lm_eval_runner.load_scores(path) for name, path in paths.items()}


def _loaded(checkpoint: Checkpoint, run: Run) -> PreTrainedModel:
    """The whole model; what is packed stays packed."""
    require_memory([checkpoint], run.dtype, run.device, "has to be whole for tasks")
    return load_as_run(checkpoint, run.dtype, run.device, run.options.attn)


def _report(
    checkpoint: Checkpoint,
    base: Checkpoint,
    chosen: Sequence[SelectedTask],
    asked: dict[str, str],
    settings: dict[str, Any],
    before: dict[str, TaskAnswers],
    after: dict[str, TaskAnswers] | None,
) -> TaskReport:
    rows: dict[str, dict[str, Any]] = {}
    for each in chosen:
        old = before[each.name]
        row = {"metric": each.metric, "documents": len(old.correct), "chance": old.chance}
        row["before"] = lm_eval_runner.accuracy(old)
        if after is not None:
            row |= {"after": lm_eval_runner.accuracy(after[each.name]), **lm_eval_runner.paired(old, after[each.name])}
        rows[each.name] = row
    average = None
    if len(chosen) > 1:
        first = list(before.values())
        average = {"before": lm_eval_runner.mean_accuracy(first)}
        if after is not None:
            second = list(after.values())
            average |= {
                "after": lm_eval_runner.mean_accuracy(second),
                "delta": lm_eval_runner.mean_change(first, second),
            }
    name = Path(base.name).name
    identity = fingerprint(checkpoint.fingerprint, base.fingerprint, settings, asked)
    title = name if after is None else checkpoint.folder.name
    return TaskReport(title, name, checkpoint.fingerprint, base.fingerprint, settings, rows, average, identity)
