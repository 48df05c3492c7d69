"""Which tasks are meant by a word: ours, the paper's, any of lm_eval's, or those of a file; ready to be asked.

lm_eval is an extra and slow to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log
from moe_compress.zoo import questions

# The eight tasks of arXiv 2406.02500, and where lm_eval keeps them: reading its whole list takes many seconds.
PAPER = {
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "rte": "glue/rte",
    "winogrande": "winogrande",
}
# Accuracy by length-normalized likelihood where a task has it, as in the paper.
METRICS = ("acc_norm", "acc", "exact_match")
QUESTIONS = 500
SHOTS = 20
SEED = 1234  # of the examples that few-shot prompts hold
INSTEAD = "use tasks=local, or the path of a task file (.yaml), or run it where the hub can be reached"


@dataclass(frozen=True)
class SelectedTask:
    """What one row is about: a task of lm_eval, or the parts of a group that lm_eval reports as one."""

    name: str
    metric: str
    parts: tuple[Any, ...]


def version() -> str:
    """Of lm_eval; ValueError if it is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks are run by lm_eval, which is not installed: pip install 'moe-compress[tasks]'.")
    return importlib.metadata.version("lm_eval")


def choose(words: str | Sequence[str], fewshot: int = 0) -> list[SelectedTask]:
    """Tasks by name: `local`, `paper`, names and groups of lm_eval, paths of .yaml files or folders of them.

    Several are a list, or joined by commas. fewshot: examples in every prompt, but where a task insists on none. Raises
    ValueError for a task that is unknown, in which nothing is right or wrong, or whose data cannot be reached.
    """
    version()
    found: dict[str, SelectedTask] = {}
    with quiet():
        for word in words.split(",") if isinstance(words, str) else words:
            for chosen in _choose(word.strip(), fewshot):
                if chosen.name in found:
                    raise ValueError(f"the task {chosen.name} is asked for twice.")
                found[chosen.name] = chosen
    for part in (part for chosen in found.values() for part in chosen.parts):
        if part.get_config("num_fewshot") != 0:
            part.set_config("num_fewshot", fewshot)
    return list(found.values())


def _choose(word: str, fewshot: int) -> list[SelectedTask]:
    if word == "local" and fewshot > SHOTS:
        raise ValueError(f"fewshot={fewshot}: the local tasks have {SHOTS} examples.")
    if word == "local":
        return [SelectedTask(name, _metric(task), (task,)) for name, task in _local(fewshot > 0).items()]
    if word == "paper":
        manager = _manager([_stock() / folder for folder in PAPER.values()])
        return [chosen for name in PAPER for chosen in _named(manager, name)]
    if "/" in word or word.endswith((".yaml", ".yml")):
        return _at(Path(word).expanduser().resolve())
    manager = _manager([_stock()])
    known = ["local", "paper", *manager.all_tasks]
    if word not in known:
        near = " or ".join(difflib.get_close_matches(word, known, 3)) or "local or paper"
        raise ValueError(f"unknown task {word!r}: did you mean {near}? A path has a `/` in it, or ends in .yaml.")
    return _named(manager, word)


def _stock() -> Path:
    """Where lm_eval keeps its own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _manager(folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


def _at(path: Path) -> list[SelectedTask]:
    """The task in a file, or every task in a folder."""
    if path.is_file():
        return _named(_manager([]), str(path))
    if not path.is_dir():
        raise ValueError(f"there is no task file or folder {path}.")
    manager = _manager([path])
    read = {entry.yaml_path for entry in manager.task_index.values()}
    for unread in sorted(set(path.rglob("*.yaml")) - read):
        log.warning("%s holds no task that can be read.", unread)
    if not manager.all_subtasks:
        raise ValueError(f"{path} holds no task: a .yaml file in lm_eval's format is needed.")
    return [chosen for name in manager.all_subtasks for chosen in _named(manager, name)]


def _named(manager: Any, name: str) -> list[SelectedTask]:
    """A row for each task; one for a whole group if that counts every document alike."""
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise ValueError(f"the data of the task {name} is on the hub, which cannot be reached: {INSTEAD}.") from error
    except Exception as error:  # whatever a task's file, data and code raise
        raise ValueError(f"the task {name} does not load: {' '.join(str(error).split())}") from error
    group = next(iter(loaded.get("groups", {}).values()), None)
    if group is not None and group.aggregate_metric_list and group.aggregate_metric_list[0].weight_by_size:
        parts = tuple(group.get_all_tasks())
        return [SelectedTask(group.name, _metric(*parts), parts)]
    return [SelectedTask(task, _metric(part), (part,)) for task, part in loaded["tasks"].items()]


def _metric(*parts: Any) -> str:
    """The first of METRICS that all parts have."""
    for metric in METRICS:
        if all(metric in part.aggregation() for part in parts):
            return metric
    raise ValueError(
        f"the task {parts[0].task_name} says of no document whether it was right ({', '.join(METRICS)}), so two models "
        "cannot be compared on it document by document."
    )


def _local(shots: bool) -> dict[str, Any]:
    """The tasks that ship with the package; examples for few-shot prompts come from the calibration text."""
    from lm_eval.api.task import ConfigurableTask

    return {name: ConfigurableTask(config=_config(name, make, shots)) for name, make in questions.MAKERS.items()}


def _config(name: str, make: Callable[[str, int], tuple[questions.Question, ...]], shots: bool) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    def data(**_: Any) -> Any:
        asked = {"test": make("heldout", QUESTIONS), **({"shots": make("calibration", SHOTS)} if shots else {})}
        return DatasetDict({split: Dataset.from_list([vars(each) for each in found]) for split, found in asked.items()})

    return {
        "task": name,
        "custom_dataset": data,
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "shots" if shots else None,
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": questions.VERSION},
    }


def prepared(chosen: SelectedTask) -> tuple[Any, ...]:
    """Its parts, about to draw the same examples for their prompts as any time before."""
    for part in chosen.parts:
        part.set_fewshot_seed(SEED)
    return chosen.parts


def identity(chosen: SelectedTask, limit: int | None) -> str:
    """Sixteen hex digits of everything that a model would be asked, and of the right answers."""
    asked = []
    with quiet():
        for part in prepared(chosen):
            part.build_all_requests(limit=limit)
            asked += [(each.args, part.doc_to_target(each.doc)) for each in part.instances]
    return fingerprint(chosen.name, chosen.metric, repr(asked))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without notes and bars of lm_eval, and of what fetches and reads its data; what matters is raised."""
    import datasets
    import lm_eval.api.task as task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub.utils._http")]
    levels, shown, bar = [each.level for each in loggers], not datasets.are_progress_bars_disabled(), task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        task.tqdm = bar
        if shown:
            datasets.enable_progress_bars()
