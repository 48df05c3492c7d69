"""Processor time of commands that should answer at once, as ratios to importing what a command line is made of.

Every run is a process of its own, and what it starts counts as well; a ratio is one of medians. Planning is compared
with a process that builds the planned model's skeleton once. Nothing here imports torch before that: what a process
holds while it starts another is part of the other's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "results"
SOURCES = RESULTS.parent / "src"
PROGRAM = ("-m", "moe_compress")
MODEL, RECIPE = "deepseek-ai/DeepSeek-V3", "expert_drop keep=128 + layer_drop drop=4"
RECORDS = "tiny-mixtral-score-[a-m]*-ratio-0.25-seed0.json"
AT_MOST, PLAN_AT_MOST, MEMORY_AT_MOST = 4, 3, 2


@dataclass(frozen=True)
class Command:
    """Words behind `python` and the exit status that they should end with."""

    words: tuple[str, ...]
    status: int = 0

    @property
    def name(self) -> str:
        """What is told apart by it: the words of the command line, or the code."""
        return " ".join(word for word in self.words if word not in ("-c", *PROGRAM))


@dataclass(frozen=True)
class Cost:
    """Of a run, or medians of several: seconds of processor time, children included, and the peak of memory."""

    seconds: float
    peak_bytes: int


def ours(*words: str, status: int = 0) -> Command:
    """A command of moe-compress."""
    return Command((*PROGRAM, *words), status)


COMMANDS = (
    Command(("-c", "import moe_compress")),
    ours("--help"),
    ours("compress", "--help"),
    ours("speed", "--help"),
    ours("list"),
    ours("list", "expert_drop"),
    ours("zoo"),
    ours("table", "records"),
    ours("report", "records"),
    ours("comprss", status=2),
    ours("compress", "expert_drp", status=2),
    ours("compress", "expert_drop kep=6", status=2),
    ours("compress", "expert_drop", "samples=x", status=2),
    ours("evaluate", "tiny-mixtral", "nope=1", status=2),
    ours("speed", "tiny-mixtral", "quick=perhaps", status=2),
)
SKELETON = Command((str(Path(__file__).resolve()), "--skeleton"))
PLAN = ours("plan", RECIPE, f"model={MODEL}")


def environment() -> dict[str, str]:
    """That of a run: this project's sources come first."""
    sources = os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": sources}


def run(command: Command, folder: Path) -> Cost:
    """One run in a folder. ValueError if it does not end as it should."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", *command.words], cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
            env=environment(),
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != command.status:
            said.seek(0)
            words = said.read().decode(errors="replace").strip()
            raise ValueError(f"{command.name} ended with {process.returncode}, not {command.status}: {words[-2000:]}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def measured(commands: Sequence[Command], runs: int, folder: Path) -> dict[str, Cost]:
    """Every command so many times, in turn, so that what slows the machine for a while slows all."""
    found: dict[str, list[Cost]] = {command.name: [] for command in commands}
    for _ in range(runs):
        for command in commands:
            found[command.name].append(run(command, folder))
    return {
        name: Cost(
            statistics.median(cost.seconds for cost in costs),
            int(statistics.median(cost.peak_bytes for cost in costs)),
        )
        for name, costs in found.items()
    }


def start_figures(commands: Sequence[Command], runs: int, folder: Path) -> dict[str, Any]:
    """Print each command's ratio to the imports; returns all figures."""
    base = Command(("-c", "import typer, pydantic, yaml, rich"))
    costs = measured([base, *commands], runs, folder)
    least = costs[base.name]
    print(
        f"{base.name}: {least.seconds:.2f} s of processor time, the median of {runs}; times that (at most {AT_MOST}):"
    )
    for command in commands:
        cost = costs[command.name]
        print(f"  {cost.seconds / least.seconds:6.1f}  {command.name}  ({cost.peak_bytes / 2**20:.0f} MiB)")
    ratios = {command.name: costs[command.name].seconds / least.seconds for command in commands}
    return {"ratios": ratios, "costs": {name: asdict(cost) for name, cost in costs.items()}}


def plan_figures(runs: int, folder: Path) -> dict[str, Any]:
    """Print what planning takes beside one skeleton, with the imports of both and without; returns all figures."""
    costs = measured([SKELETON, PLAN], runs, folder)
    one, plan = costs[SKELETON.name], costs[PLAN.name]
    said = subprocess.run(
        [sys.executable, "-P", *SKELETON.words], env=environment(), check=True, capture_output=True, text=True
    ).stdout
    building = float(said)
    ratio, alone = plan.seconds / one.seconds, (plan.seconds - one.seconds + building) / building
    peak = plan.peak_bytes / 2**30
    print(
        f"{PLAN.name}: {ratio:.1f} x a process that builds the skeleton once ({one.seconds:.1f} s; at most "
        f"{PLAN_AT_MOST}), {alone:.1f} x building alone without imports ({building:.1f} s); {peak:.2f} GiB at its peak "
        f"(under {MEMORY_AT_MOST})"
    )
    figures = {"ratio": ratio, "ratio_without_imports": alone, "peak_gib": peak, "building_seconds": building}
    return {**figures, "skeleton": asdict(one), "plan": asdict(plan)}


def build_skeleton() -> float:
    """Build the planned model without weights, from the config that ships; its processor time without the imports."""
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401  (which it would import)

    from moe_compress import zoo
    from moe_compress.checkpoints.reader import architecture_values
    from moe_compress.models import hf

    config = zoo.config_path(MODEL)
    assert config is not None
    started = time.process_time()
    hf.skeleton(hf.config_from(architecture_values(config.parent)), torch.bfloat16)
    return time.process_time() - started


def copy_records(folder: Path) -> int:
    """Copy a few shipped records, and the original's, to folder/records; returns how many."""
    found = [*(RESULTS / "records").glob("tiny-mixtral-original*.json"), *(RESULTS / "records").glob(RECORDS)]
    (folder / "records").mkdir()
    for path in found:
        shutil.copy(path, folder / "records")
    return len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all commands, or those that hold a word, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="a word: measure the commands that hold it, such as zoo or plan")
    parser.add_argument("--out", type=Path, help="keep the figures as JSON, for example in results/startup.json")
    parser.add_argument("--skeleton", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.skeleton:
        print(build_skeleton())
        return
    chosen = [command for command in COMMANDS if given.only in command.name]
    planning = given.only in PLAN.name
    if not (chosen or planning) or given.runs < 1:
        parser.error("--only needs a word of a command, and --runs a number from 1 up.")
    figures: dict[str, Any] = {"runs": given.runs}
    with tempfile.TemporaryDirectory() as place:
        copy_records(Path(place))
        if chosen:
            figures["start"] = start_figures(chosen, given.runs, Path(place))
        if planning:
            figures["plan"] = plan_figures(given.runs, Path(place))
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
