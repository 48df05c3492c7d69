"""What the benchmark scripts share: the least time of alternating runs, random text, and where figures are kept."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_compress.data.windows import Windows
from moe_compress.evaluation.statistics import per_token
from moe_compress.reports.table_formats import with_interval
from moe_compress.utils.files import atomic_write

RESULTS = Path(__file__).resolve().parents[2] / "results"


def fastest(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Fewest seconds of each over alternating rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def random_windows(vocab: int, rows: int, length: int, first: int = 0) -> Windows:
    """Windows of random tokens from `first` on."""
    ids = torch.randint(first, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    number = torch.arange(rows)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Windows(ids, mask, number[:, None].expand_as(ids), torch.zeros_like(number), ("text",), "", {})


def add_smoke(parser: argparse.ArgumentParser) -> None:
    """Let a script be tried in seconds."""
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny setting: everything runs, in seconds, and the figures mean nothing"
    )


def save_figures(figures: Mapping[str, Any], out: Path, smoke: bool) -> None:
    """Keep figures as JSON; those of a smoke run do not replace the shipped ones."""
    if smoke and out.resolve().parent == RESULTS:
        print(f"a smoke run: nothing is written to {RESULTS}.")
        return
    atomic_write(out, (json.dumps(figures, indent=1) + "\n").encode())


def paired_difference(better: Sequence[Path], worse: Sequence[Path]) -> str:
    """Mean difference of NLL per token with its interval, of sums per document; each side is the mean of its files."""
    sides = [[load_file(file) for file in side] for side in (better, worse)]
    means = [torch.stack([found["nll"] for found in side]).mean(0) for side in sides]
    found = per_token((means[0] - means[1]).numpy(), sides[0][0]["tokens"].numpy(), "nats/token")
    return with_interval(found["value"], found["interval"], "+.3f")
