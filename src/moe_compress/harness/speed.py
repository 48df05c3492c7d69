"""How fast two checkpoints run beside each other, and what memory they take, at several prompts and batches.

Each is loaded in a process of its own, where nothing else runs; they are timed in turn (timing.py), so that what slows
the machine for a while slows both. The numbers are medians of paired ratios with bootstrap intervals.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moe_compress.harness.timing import Effort, paired
from moe_compress.harness.worker import How, Point, Worker
from moe_compress.runtime import log

# Share of the processor that others may use; the load average would count what this process did a minute ago.
BUSY = 0.25
LOOK_SECONDS = 1.0
QUICK = Effort(pairs=6, seconds=1.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: every prompt with every batch, `tokens` decoded behind it; how long; as what, and where."""

    prompts: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = (1, 8)
    tokens: int = 32
    effort: Effort = field(default_factory=Effort)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None

    def points(self) -> list[Point]:
        """All of them. ValueError for counts below one."""
        if min(*self.prompts, *self.batches, self.tokens, self.effort.pairs) < 1 or not self.effort.seconds >= 0:
            raise ValueError("prompts=, batches=, tokens= and runs= are counts from 1 up, seconds= from 0 up.")
        return [Point(batch, prompt, self.tokens) for batch in self.batches for prompt in self.prompts]


def compare_speed(original: Path, variant: Path, setting: Setting) -> dict[str, Any]:
    """Seconds, ratios (above 1: the variant is faster) and memory at every point; kernels, load and clocks."""
    points, before = setting.points(), machine(setting.device)
    if before["busy"]:
        log.warning("BUSY: others use %.0f %% of the processor: do not trust these times.", 100 * before["used"])
    how = How(setting.dtype, setting.device, setting.threads)
    with Worker(original, how) as first, Worker(variant, how) as second:
        found = [_point(first, second, point, setting.effort) for point in points]
        about = [first.about, second.about]
    return {
        "setting": asdict(setting),
        "machine": {"before": before, "after": machine(setting.device)},
        "original": about[0],
        "variant": about[1],
        "points": found,
    }


def _point(first: Worker, second: Worker, point: Point, effort: Effort) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": point.batch, "prompt": point.prompt, "tokens": point.tokens}
    for what, tokens in (("prefill", point.batch * point.prompt), ("decode", point.batch)):
        used = [_energy(), _energy()]
        pair = paired(lambda: first.ask(what, point), lambda: second.ask(what, point), effort)  # noqa: B023
        used[1] = _energy()
        times = pair.to_json()
        rates = {f"{side}_tokens_per_second": tokens / times[f"{side}_seconds"] for side in ("original", "variant")}
        joules = None if None in used else (used[1] - used[0]) / 1000  # type: ignore[operator]
        found[what] = {**times, **rates, "joules_of_both": "not available" if joules is None else joules}
    found["memory"] = {"original": first.ask("memory", point), "variant": second.ask("memory", point)}
    return found


def machine(device: str) -> dict[str, Any]:
    """What else the machine does, seen for a moment while this process waits, and its clocks."""
    used, (load, cores) = used_by_others(), _load()
    clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "load": load,
        "cores": cores,
        "used": used,
        "busy": used > BUSY,
        "megahertz": None if clock is None else clock.current,
        "device": device,
    }


def used_by_others() -> float:
    """Share of all processors that is in use while this process sleeps."""
    return float(psutil.cpu_percent(LOOK_SECONDS)) / 100


def _load() -> tuple[float, int]:
    """Processes that want to run, on average of the last minute, and cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return psutil.getloadavg()[0], cores


def _energy() -> int | None:
    """Millijoules that the first GPU has used so far, if its driver's library is there to say so."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except Exception:  # no library, no driver, no GPU, no counter: each has an error of its own
        return None


def numbers(words: str | Sequence[int], key: str) -> tuple[int, ...]:
    """`128,1024` as numbers. ValueError if they are none."""
    if not isinstance(words, str):
        return tuple(words)
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError as error:
        raise ValueError(f"{key}={words}: numbers separated by commas are needed, such as 128,1024.") from error
