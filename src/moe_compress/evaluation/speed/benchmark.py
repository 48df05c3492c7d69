"""How fast two checkpoints run beside each other, and what memory they take, at several prompts and batches.

Each is loaded in a process of its own, where nothing else runs; they are timed in turn (paired_timing.py), so that what
slows the machine for a while slows both, and started anew several times. The numbers are medians of paired ratios with
bootstrap intervals.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from moe_compress.evaluation.speed import gpu_energy
from moe_compress.evaluation.speed.paired_timing import STARTS, PairedTurns, TimingBudget, paired, summary
from moe_compress.evaluation.speed.worker import RunSetup, Worker, Workload
from moe_compress.utils.logging import log

# Share of the processor that others may use; the load average would count what this process did a minute ago.
BUSY = 0.25
LOOK_SECONDS = 1.0
SIDES = ("original", "variant")
QUICK = TimingBudget(runs=20, seconds=3.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: every prompt with every batch, `tokens` decoded behind it; how long; as what, and where.

    starts: how often both processes are started; they share the effort.
    """

    prompts: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = (1, 8)
    tokens: int = 32
    effort: TimingBudget = field(default_factory=TimingBudget)
    starts: int = STARTS
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def points(self) -> list[Workload]:
        """All of them. ValueError for counts below one."""
        if (
            min(*self.prompts, *self.batches, self.tokens, self.threads, self.starts, self.effort.runs) < 1
            or not 0 <= self.effort.seconds < math.inf
        ):
            raise ValueError(
                "prompts=, batches=, tokens=, threads=, starts= and runs= are counts from 1 up, seconds= from 0 up."
            )
        return [Workload(batch, prompt, self.tokens) for batch in self.batches for prompt in self.prompts]


def compare_speed(
    original: Path, variant: Path, setting: Setting, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Seconds, ratios (above 1: the variant is faster) and memory at every point; kernels, load and clocks."""
    before = machine(setting.device)
    if before["used"] > BUSY:
        log.warning("BUSY: others use %.0f %% of the processor: do not trust these times.", 100 * before["used"])
    how = RunSetup(setting.dtype, setting.device, setting.threads, copied=not setting.device.startswith("cuda"))
    starts: list[StartTimings] = []
    with Worker(original, how) as first, Worker(variant, how) as second:
        for number in range(setting.starts):
            starts.append(_started((first, second), setting, memory=not starts))
            if progress is not None:
                progress(number + 1, setting.starts)
    after = machine(setting.device)
    during = max(start.used_by_others for start in starts)
    return {
        "setting": asdict(setting),
        "machine": {
            "before": before, "after": after, "used_during": during, "gpu_megahertz": starts[0].gpu_megahertz,
            "busy": max(before["used"], during, after["used"]) > BUSY,
        },
        **dict(zip(SIDES, starts[0].about, strict=True)),
        "points": [_point(starts, point) for point in setting.points()],
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StartTimings:
    """What one start of both processes gave: turns and joules by point and question; of the first, memory by point."""

    about: list[dict[str, Any]]
    turns: dict[tuple[Workload, str], PairedTurns]
    joules: dict[tuple[Workload, str], list[float | None]]
    memory: dict[Workload, list[dict[str, int]]]
    used_by_others: float
    gpu_megahertz: float | None


def _started(workers: Sequence[Worker], setting: Setting, memory: bool) -> StartTimings:
    """Start both processes, time them at every point, and ask for their memory, which no start changes; end them."""
    effort = setting.effort.share(setting.starts)
    for worker in workers:
        worker.start()
    about = [worker.loaded() for worker in workers]
    meters = [gpu_energy.Meter((each["gpu"] or {}).get("uuid")) for each in about]
    others = OtherLoad([os.getpid(), *(each.pop("process") for each in about)])
    found = StartTimings(about, {}, {}, {}, 0.0, None)
    for point in setting.points():
        for what, tokens in (("prefill", 1), ("decode", point.tokens)):
            asked = [functools.partial(worker.ask, what, point) for worker in workers]
            turns = [meter.around(ask) for meter, ask in zip(meters, asked, strict=True)]
            times = found.turns[point, what] = paired(turns[0], turns[1], effort)
            found.joules[point, what] = [meter.taken(len(times.first) * tokens) for meter in meters]
        if memory:
            found.memory[point] = [worker.ask("memory", point) for worker in workers]
    found = replace(found, used_by_others=others.share(), gpu_megahertz=meters[0].megahertz())
    for worker in workers:
        worker.end()
    return found


def _point(starts: Sequence[StartTimings], point: Workload) -> dict[str, Any]:
    """All starts at one point."""
    found: dict[str, Any] = {"batch": point.batch, "prompt": point.prompt, "tokens": point.tokens}
    for what, steps, tokens in (("prefill", 1, point.prompt), ("decode", point.tokens, 1)):
        times = summary([start.turns[point, what] for start in starts], steps)
        rates = {f"{side}_tokens_per_second": point.batch * tokens / times[f"{side}_seconds"] for side in SIDES}
        joules = zip(*(start.joules[point, what] for start in starts), strict=True)
        found[what] = {**times, **rates, "joules": dict(zip(SIDES, map(_mean, joules), strict=True))}
    found["memory"] = dict(zip(SIDES, starts[0].memory[point], strict=True))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class OtherLoad:
    """Share of all processors that neither this process nor its workers use, from now on."""

    def __init__(self, ours: Sequence[int]) -> None:
        self.ours = [psutil.Process(pid) for pid in ours]
        self.since = self._used()

    def _used(self) -> tuple[float, float]:
        """Seconds of all processors together: in all, and those in which others computed."""
        everyone = psutil.cpu_times()
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        # Guests' time is in user's as well, and stolen time is another machine's.
        whole = sum(everyone) - getattr(everyone, "guest", 0.0) - getattr(everyone, "guest_nice", 0.0)
        mine = sum(sum(process.cpu_times()[:2]) for process in self.ours)
        return whole, whole - idle - mine

    def share(self) -> float:
        """Between 0 and 1."""
        whole, used = (now - then for now, then in zip(self._used(), self.since, strict=True))
        return min(max(used / whole, 0.0), 1.0) if whole > 0 else 0.0


def machine(device: str) -> dict[str, Any]:
    """What else the machine does, seen for a moment while this process waits, and its clocks."""
    used, (load, cores) = used_by_others(), _load()
    clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "load": load,
        "cores": cores,
        "used": used,
        "megahertz": None if clock is None else clock.current,
        "device": device,
    }


def used_by_others() -> float:
    """Share of all processors that is in use while this process sleeps."""
    return float(psutil.cpu_percent(LOOK_SECONDS)) / 100


def _load() -> tuple[float, int]:
    """Processes that want to run, on average of the last minute, and cores."""
    return psutil.getloadavg()[0], cores()


def cores() -> int:
    """Processors that this process may use; of two that share a core, one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
