"""Records and harness files with known numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moe_compress.reports.record import Metric, Record

HOSTILE = '<script>document.title = "owned"</script><img src="https://example.org/x.png" onerror="boom()">'
DOCUMENTS, TOKENS = 60, 100.0
PROTOCOL = {
    "id": "0123456789abcdef",
    "text": {"source": "zoo", "tokens": 6000, "windows": 60, "length": 101},
    "dtype": "float32",
    "device": "cpu",
}


def record(name: str, nll: float, stages: list[tuple[str, dict]] = (), **changes) -> Record:
    """A run whose mean loss is `nll`, or what `changes` say instead."""
    delta = Metric(value=nll - 2, unit="nats/token", interval=(nll - 2.01, nll - 1.99))
    perplexity = Metric(value=math.exp(nll), unit="perplexity", interval=(math.exp(nll) - 0.1, math.exp(nll) + 0.1))
    values = {
        "name": name,
        "model": "tiny",
        "base": {"commit": None, "fingerprint": "abc"},
        "recipe": [{"method": m, "given": given, "parameters": {**given, "unsaid": 1}} for m, given in stages],
        "seed": 0,
        "form": "plain" if stages else "original",
        "protocol": PROTOCOL,
        "metrics": {"perplexity": perplexity, **({"delta_nll": delta} if stages else {})},
        "sizes": {"parameters": 2e6, "bytes": 4 * 2**20, "touched": 1e6, "flops_per_token": 2e6},
        "cost": {},
        "report": [],
        "environment": {"python": "3.11"},
        "written": "2026-01-01T00:00:00+00:00",
    }
    return Record(**{**values, **changes})


def sized(mib: float, flops: float = 2e6) -> dict[str, dict[str, float]]:
    return {"sizes": {"parameters": 1e6, "bytes": mib * 2**20, "touched": 1e6, "flops_per_token": flops}}


ORIGINAL = record("tiny-original", 2.0)
WORSE = record("worse", 2.5, [("expert_drop", {"keep": 6, "seed": 0})], **sized(3))
SAME_AS = record("same_as", 2.001, [("quantize", {"bits": "100%_&{}"})], **sized(2, 3e6))


def measured(folder: Path, made: Record, nll: np.ndarray, tokens: np.ndarray | None = None) -> Record:
    """The record with sums per document beside it, and the perplexity that they have."""
    tokens = np.full(DOCUMENTS, TOKENS) if tokens is None else tokens
    folder.mkdir(exist_ok=True)
    save_file({"nll": nll, "tokens": tokens}, folder / f"{made.name}.safetensors")
    value = math.exp(nll.sum() / tokens.sum())
    perplexity = Metric(value=value, unit="perplexity", interval=(0.9 * value, value / 0.9))
    return made.model_copy(update={"metrics": {**made.metrics, "perplexity": perplexity}})


def speed_file(model: str, speedup: float, batch: int = 1, busy: bool = False, processor: str = "abacus") -> dict:
    decode = {"speedup": speedup, "speedup_interval": [speedup - 0.1, speedup + 0.1]}
    setting = {"dtype": "float32", "device": "cpu", "threads": 1, "tokens": 16}
    points = [{"batch": batch, "prompt": 128, "prefill": decode, "decode": decode}]
    found = {"setting": setting, "machine": {"busy": busy}, "points": points, "original": {"gpu": None, "threads": 1}}
    where = {"processor": processor}
    return {"model": model, "original": "tiny", "fingerprint": f"of {model}", "environment": where, "found": found}


def tasks_file(model: str, right: float) -> dict:
    tasks = {"quiz": {"before": {"value": 0.9, "interval": None, "unit": "fraction"}}}
    tasks["quiz"]["after"] = {"value": right, "interval": (right - 0.1, right + 0.1), "unit": "fraction"}
    common = {"original": "tiny", "fingerprint": f"of {model}", "average": None, "settings": {"limit": 5}}
    return {"model": model, "tasks": tasks, **common}
