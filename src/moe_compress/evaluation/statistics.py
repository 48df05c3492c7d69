"""Numbers with intervals: bootstraps over documents, paired wherever two models saw the same text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from moe_compress.evaluation.quality.perplexity import Measurement

RESAMPLES = 10_000
LEVEL = 0.95
Metric = dict[str, Any]


def metrics(this: Measurement, original: Measurement | None) -> dict[str, Metric]:
    """Every metric of a measurement: value, unit, 95 % interval (None where none can be given)."""
    out = {
        "perplexity": _perplexity(this, None),
        "nll": per_token(this.nll.numpy(), this.tokens.numpy(), "nats/token"),
    }
    for index, domain in enumerate(this.domains):
        if len(this.domains) > 1:
            out[f"perplexity_{domain}"] = _perplexity(this, index)
    if original is not None:
        out["delta_nll"] = _delta(this, original)
        for index, domain in enumerate(this.domains if len(this.domains) > 1 else ()):
            out[f"delta_nll_{domain}"] = _delta(this, original, index)
    if this.kl is not None and this.agree is not None:
        out["kl"] = per_token(this.kl.numpy(), this.tokens.numpy(), "nats")
        out["top1_agreement"] = per_token(this.agree.numpy(), this.tokens.numpy(), "fraction")
    if this.correct is not None:
        out["task_accuracy"] = accuracy(this.correct)
        if original is not None and original.correct is not None:
            change = this.correct.double() - original.correct.double()
            out["delta_task_accuracy"] = per_token(change.numpy(), np.ones(len(change)), "fraction")
            out["task_flips"] = accuracy(change != 0)
    return out


def metric(value: float, unit: str, low: float | None = None, high: float | None = None) -> Metric:
    """One number, its unit and its interval."""
    interval = None if low is None or high is None else [float(low), float(high)]
    return {"value": float(value), "unit": unit, "interval": interval}


def _perplexity(this: Measurement, domain: int | None) -> Metric:
    chosen = slice(None) if domain is None else (this.domain == domain).numpy()
    nll, tokens = this.nll.numpy()[chosen], this.tokens.numpy()[chosen]
    interval = _bootstrap((nll, tokens), lambda n, t, axis=-1: np.exp(n.sum(axis) / t.sum(axis)))
    return metric(float(np.exp(nll.sum() / tokens.sum())), "perplexity", *interval)


def _delta(this: Measurement, original: Measurement, domain: int | None = None) -> Metric:
    """Change of the mean negative log likelihood per token, paired by document; of all domains, or of one."""
    chosen = slice(None) if domain is None else (this.domain == domain).numpy()
    difference = (this.nll - original.nll).numpy()[chosen]
    return per_token(difference, this.tokens.numpy()[chosen], "nats/token")


def per_token(total: Any, tokens: Any, unit: str) -> Metric:
    """Mean over all tokens of sums by document, with its interval."""
    interval = _bootstrap((total, tokens), lambda x, t, axis=-1: x.sum(axis) / t.sum(axis))
    return metric(float(total.sum() / tokens.sum()), unit, *interval)


def accuracy(correct: Tensor) -> Metric:
    """Share of those that are true, right answers say, with Wilson's interval."""
    from scipy import stats  # here: to plan needs none of it, and should not wait for it

    right, asked = int(correct.sum()), len(correct)
    interval = stats.binomtest(right, asked).proportion_ci(LEVEL, method="wilson")
    return metric(right / asked, "fraction", interval.low, interval.high)


def _bootstrap(data: tuple[Any, ...], statistic: Callable[..., Any]) -> tuple[float | None, float | None]:
    """Percentile interval over resampled documents; (None, None) with fewer than two documents."""
    from scipy import stats  # here: to plan needs none of it, and should not wait for it

    if len(data[0]) < 2:
        return None, None
    result = stats.bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
        method="percentile", batch=1000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
