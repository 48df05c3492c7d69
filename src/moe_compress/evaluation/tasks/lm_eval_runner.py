"""Tasks of lm_eval on a model in memory: right or wrong, document by document, so that any two models can be paired.

lm_eval's `evaluate` is called rather than `simple_evaluate`, which also seeds the process's random numbers and spends
a second on a report of the machine; the numbers are the same. D documents, C choices at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.engine.forward import Progress
from moe_compress.evaluation import statistics
from moe_compress.evaluation.statistics import LEVEL, RESAMPLES, Metric
from moe_compress.evaluation.tasks.selection import SelectedTask, prepared, quiet
from moe_compress.utils.logging import log

BATCH = 16


@dataclass(frozen=True)
class TaskAnswers:
    """How a model answered.

    correct: bool [D]; document: int64 [D], which ones; likelihood: of every choice, float64 [D, C], NaN where a
    document has fewer, and no column where there are no choices.
    """

    correct: Tensor
    document: Tensor
    likelihood: Tensor

    @property
    def chance(self) -> float | None:
        """Accuracy of blind guesses; None where there are no choices."""
        if not self.likelihood.shape[1]:
            return None
        return float((1 / (~self.likelihood.isnan()).sum(1)).mean())


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[SelectedTask],
    *,
    batch: int = BATCH,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskAnswers]:
    """Let lm_eval ask a model what was chosen: scores by the names of the tasks.

    batch: prompts at once; limit: documents of a task (of a group: of each part).
    """
    from lm_eval.evaluator import evaluate

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has neither a BOS nor an EOS token, and lm_eval needs one of them.")
    with quiet():
        parts = {part.task_name: part for chosen in tasks for part in prepared(chosen)}
        asked = _wrapped(model, tokenizer, batch, progress)
        found: Any = evaluate(asked, {"tasks": parts, "groups": {}}, limit=limit, bootstrap_iters=0)
    return {chosen.name: _scores(chosen, found["samples"]) for chosen in tasks}


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, progress: Progress | None) -> Any:
    """lm_eval's wrapper for a model in memory, without bars of its own."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.set_cache_hook(_Counter(len(requests), progress))
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.set_cache_hook(_Counter(len(requests), progress))
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **keywords: Any) -> Any:
            room = self.max_length + 1
            cut = sum(len(context) + len(end) > room for _, context, end in requests)
            if cut:
                log.warning(
                    "%d of %d prompts lose their beginning, so that the model can hold them.", cut, len(requests)
                )
            return super()._loglikelihood_tokens(requests, **keywords)

    return Wrapped(model, backend="causal", tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")


@dataclass
class _Counter:
    """Told of every answer, as lm_eval's cache would be."""

    total: int
    progress: Progress | None
    done: int = 0

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _scores(chosen: SelectedTask, samples: dict[str, list[dict[str, Any]]]) -> TaskAnswers:
    logged = [sample for part in chosen.parts for sample in _first_filter(samples[part.task_name])]
    values = torch.tensor([float(sample[chosen.metric]) for sample in logged], dtype=torch.float64)
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(f"{chosen.metric} of the task {chosen.name} is something between right and wrong.")
    document = torch.tensor([int(sample["doc_hash"][:15], 16) for sample in logged])
    first = [[tries[0] for tries in sample["resps"]] for sample in logged]
    known = [[each[0] for each in row] if isinstance(row[0], tuple) else [] for row in first]
    if not all(math.isfinite(value) for row in known for value in row):
        raise ValueError(f"the model's likelihoods are not finite on the task {chosen.name}: its weights are broken.")
    width = max(map(len, known))
    padded = [[*row, *[float("nan")] * (width - len(row))] for row in known]
    return TaskAnswers(values.bool(), document, torch.tensor(padded, dtype=torch.float64))


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task that reads answers in several ways logs each document several times; its first way counts."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


# --- what is kept -------------------------------------------------------------------------------------------------


def save_scores(path: Path, scores: TaskAnswers, settings: dict[str, Any]) -> None:
    """Keep the answers, document by document, and what they are answers to."""
    write_shard(path, vars(scores), {"settings": json.dumps(settings)})


def load_scores(path: Path) -> TaskAnswers:
    """Read them back; a broken file is named."""
    try:
        return TaskAnswers(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} holds no whole answers: remove it, and they are asked for anew.") from error


# --- numbers ------------------------------------------------------------------------------------------------------


def accuracy(scores: TaskAnswers) -> Metric:
    """Share of right answers, with Wilson's interval."""
    return statistics.accuracy(scores.correct)


def paired(before: TaskAnswers, after: TaskAnswers) -> dict[str, Any]:
    """Change of accuracy, bootstrapped over documents; right ones lost and wrong ones gained, and McNemar's exact p.

    Raises ValueError if the two were not asked the same.
    """
    if not torch.equal(before.document, after.document):
        raise ValueError("the two models were asked different questions: they cannot be compared in pairs.")
    change = _change(before, after)
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    p = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    delta = statistics.per_token(change, np.ones_like(change), "fraction")
    return {"delta": delta, "lost": lost, "gained": gained, "p": float(p)}


def _change(before: TaskAnswers, after: TaskAnswers) -> np.ndarray:
    """-1, 0 or 1 for every document, float64 [D]."""
    return (after.correct.double() - before.correct.double()).numpy()


def mean_accuracy(scores: Sequence[TaskAnswers]) -> Metric:
    """Plain mean over tasks."""
    return _mean_of_means([each.correct.double().numpy() for each in scores])


def mean_change(before: Sequence[TaskAnswers], after: Sequence[TaskAnswers]) -> Metric:
    """Change of the plain mean over tasks, paired by document."""
    return _mean_of_means([_change(*pair) for pair in zip(before, after, strict=True)])


def _mean_of_means(values: Sequence[np.ndarray]) -> Metric:
    """With a bootstrap in which every task keeps its number of documents.

    Values are -1, 0 or 1, so what is drawn anew is how often each comes, which is the same and needs no memory.
    """
    draw = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for each in values:
        share = [np.mean(each == value) for value in (-1, 0, 1)]
        counts = draw.multinomial(len(each), share, size=RESAMPLES)
        means += (counts[:, 2] - counts[:, 0]) / len(each) / len(values)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return statistics.metric(float(np.mean([each.mean() for each in values])), "fraction", low, high)
