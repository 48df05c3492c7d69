"""How fast two checkpoints decode, and what memory they take, measured beside each other.

Each is loaded in a process of its own, where nothing else runs; they are timed in turn (A B B A ...), so that what
slows the machine for a while slows both. The numbers are the medians of the pairs' ratios, with a bootstrap interval.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_compress import zoo
from moe_compress.checkpoint.load import load_model, load_packed
from moe_compress.checkpoint.reader import open_checkpoint
from moe_compress.model.packed import PackedMatrix
from moe_compress.runtime import DTYPES, peak_memory_bytes, reset_peak_memory, return_memory, threads

WARM_UP = 3
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Setting:
    """`batch` sequences of `context` tokens decode `tokens` more, `pairs` times; dtype: as the models are run."""

    batch: int = 1
    context: int = 128
    tokens: int = 32
    pairs: int = 10
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None


def compare_speed(original: Path, variant: Path, setting: Setting) -> dict[str, Any]:
    """Seconds per token of both, their ratio (above 1: the variant is faster), bytes of the weights and at the peak."""
    with _Worker(original, setting) as first, _Worker(variant, setting) as second:
        seconds: list[tuple[float, float]] = []
        for n in range(setting.pairs):
            order = (first, second) if n % 2 == 0 else (second, first)
            times = {id(worker): worker.ask("decode") for worker in order}
            seconds.append((times[id(first)], times[id(second)]))
        memory = [worker.ask("memory") for worker in (first, second)]
    ratios = [a / b for a, b in seconds]
    return {
        "setting": asdict(setting),
        "original_seconds_per_token": statistics.median(a for a, _ in seconds),
        "variant_seconds_per_token": statistics.median(b for _, b in seconds),
        "speedup": statistics.median(ratios),
        "speedup_interval": median_interval(ratios),
        "original": memory[0],
        "variant": memory[1],
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median."""
    generator = np.random.default_rng(0)
    draws = generator.choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


class _Worker:
    """A process that holds one model and answers `decode` and `memory`."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, folder, setting), daemon=True)

    def __enter__(self) -> _Worker:
        self.process.start()
        self._answer()  # it has loaded and warmed up
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.send("end")
        self.process.join()

    def ask(self, what: str) -> Any:
        """The answer to one question."""
        self.connection.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError as error:
            raise ValueError("the process that measures speed ended early: it may have run out of memory.") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Any, folder: Path, setting: Setting) -> None:
    try:
        device = torch.device(setting.device)
        with threads(setting.threads), torch.inference_mode():
            # Libraries that come in with a first model are no part of what this one takes.
            decode(load(zoo.path(zoo.NAMES[0]), DTYPES[setting.dtype], device), setting)
            return_memory()
            reset_peak_memory(device)
            before = peak_memory_bytes(device)
            model = load(folder, DTYPES[setting.dtype], device)
            for _ in range(WARM_UP):
                decode(model, setting)
            memory = {"weight_bytes": weight_bytes(model), "peak_bytes": peak_memory_bytes(device) - before}
            connection.send("ready")
            while (what := connection.recv()) != "end":
                connection.send(decode(model, setting) if what == "decode" else memory)
    except ValueError as error:
        connection.send(error)


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint as it is run: what is packed stays packed."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.packed:
        return load_packed(checkpoint, dtype, device, None)
    return load_model(folder, dtype, device_map=str(device))


def decode(model: Any, setting: Setting) -> float:
    """Seconds per step of greedy decoding with a cache, the prompt not counted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (setting.batch, setting.context), generator=generator)
    out = model(ids.to(model.device), use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    _wait(model)
    started = time.perf_counter()
    for _ in range(setting.tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    _wait(model)
    return (time.perf_counter() - started) / setting.tokens


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they lie in memory, kernels' layouts included, every storage once."""
    tensors: list[Tensor] = [*model.parameters()]
    for module in model.modules():
        if isinstance(module, PackedMatrix) and module.kernel is not None:
            tensors += module.kernel.tensors()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
