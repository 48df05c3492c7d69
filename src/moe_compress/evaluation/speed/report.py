"""The speed harness: what is timed, and its report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from moe_compress.checkpoints.load import require_memory
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.evaluation.harnesses import HARNESSES, harness
from moe_compress.evaluation.pair import original_for, require_same_tokens
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.evaluation.speed.benchmark import QUICK, Setting, compare_speed, cores
from moe_compress.evaluation.speed.paired_timing import STARTS, TimingBudget
from moe_compress.reports import table_formats
from moe_compress.reports.companions import STARTS_NEEDED
from moe_compress.reports.record import environment, now
from moe_compress.reports.table import SAME
from moe_compress.reports.table_formats import Cells
from moe_compress.run.progress import progress_bar
from moe_compress.utils.choices import Means, Numbers, numbers
from moe_compress.utils.devices import DTYPES, dtype_name, resolve_device, resolve_dtype
from moe_compress.utils.hashing import fingerprint

MIB = 2**20
WHAT = {"prefill": "time to the first token", "decode": "time per decoded token"}


def as_markdown(report: Mapping[str, Any]) -> str:
    """Times and their ratios, memory, and how it was measured; a busy machine is said first, and loudly."""
    found, parts = report["found"], [f"### {report['model']} beside {report['original']}"]
    if found["machine"]["busy"]:
        parts.append(f"**BUSY MACHINE: others used {_others(found['machine'])} of the processor.**")
    parts += [_table([_times(point, what) for point in found["points"] for what in WHAT])]
    parts += [_table([_memory(point, side) for point in found["points"] for side in ("original", "variant")])]
    return "\n\n".join([*parts, _how(found), MEANING]) + "\n"


def _others(machine: Mapping[str, Any]) -> str:
    shares = machine["before"]["used"], machine["used_during"], machine["after"]["used"]
    return "{:.0%} before, {:.0%} meanwhile, {:.0%} after".format(*shares)


def _joules(found: Mapping[str, float | None]) -> str:
    known = [f"{value:.3g}" for value in found.values() if value is not None]
    return " -> ".join(known) or "not available"


MEANING = (
    "Speedup: median over starts of the median ratio of A B B A blocks (above 1: faster than the original), with its "
    "95 % bootstrap interval over starts and blocks; not the ratio of the medians beside it. *: of fewer than five "
    "starts, so that it is too narrow; of one it says nothing of the next run. J: energy of one prefill, or of one "
    "decoded step. "
    "Read per step: weights that a step of decoding touches if tokens choose their experts alone and evenly, and the "
    "cache. Activations: the peak above weights and cache. Peak: all three."
)


def _table(rows: list[dict[str, str]]) -> str:
    return table_formats.markdown(Cells.of(rows))


def _times(point: Mapping[str, Any], what: str) -> dict[str, str]:
    times = point[what]
    return {
        "sequences x prompt": f"{point['batch']} x {point['prompt']}",
        "what": WHAT[what],
        "original": f"{1000 * times['original_seconds']:.2f} ms",
        "variant": f"{1000 * times['variant_seconds']:.2f} ms",
        "speedup": _speedup(times),
        "tokens/s": f"{times['original_tokens_per_second']:,.0f} -> {times['variant_tokens_per_second']:,.0f}",
        "runs of each": f"{times['runs']}",
        "J": _joules(times["joules"]),
    }


def ratio(times: Mapping[str, Any]) -> str:
    """The speedup with its interval; one that holds 1 is no detectable difference."""
    low, high = times["speedup_interval"]
    return f"{times['speedup']:.2f} [{low:.2f}, {high:.2f}]" + (f" {SAME}" if low <= 1 <= high else "")


def _speedup(times: Mapping[str, Any]) -> str:
    return ratio(times) + (" *" if times["starts"] < STARTS_NEEDED else "")


def _memory(point: Mapping[str, Any], side: str) -> dict[str, str]:
    memory = point["memory"][side]
    names = {
        "weights": "weights",
        "cache": "KV cache",
        "activations": "activations",
        "peak": "peak",
        "step_bytes": "read per step",
    }
    memory = {**memory, "peak": sum(memory[name] for name in ("weights", "cache", "activations"))}
    cells = {f"{title} MiB": f"{memory[name] / MIB:,.2f}" for name, title in names.items()}
    return {"sequences x prompt": f"{point['batch']} x {point['prompt']}", "model": side, **cells}


def _how(found: Mapping[str, Any]) -> str:
    setting, machine = found["setting"], found["machine"]["before"]
    clock = f", {machine['megahertz']:,.0f} MHz" if machine["megahertz"] else ""
    kernels = "; ".join(f"{side}: {_kernels(found[side])}" for side in ("original", "variant"))
    gpu = found["original"]["gpu"]
    where = f"{setting['device']} ({gpu['name']})" if gpu else setting["device"]
    return (
        f"{setting['dtype']} on {where}, {found['original']['threads']} thread(s); load {machine['load']:.2f} on "
        f"{machine['cores']} core(s) before{clock}, others {_others(found['machine'])}. {kernels}."
    )


def _kernels(about: Mapping[str, Any]) -> str:
    packed = "".join(f", {count} matrices of {name}" for name, count in about["packed"].items())
    return f"attention {about['attention']}, experts {about['experts']}{packed}"


@dataclass(frozen=True)
class SpeedReport(SavedReport):
    """Prefill and decoding of two models in turn: `found` holds settings, machine, kernels, times, memory."""

    model: str
    original: str
    fingerprint: str
    found: dict[str, Any]
    environment: dict[str, Any]
    written: str
    id: str

    def markdown(self) -> str:
        """Tables of times and memory."""
        return as_markdown(self.to_json())


@harness("speed", columns="moe_compress.evaluation.speed.columns")
def speed(  # noqa: PLR0913 - these are the command's words
    checkpoint: str | Path,
    /,
    original: Annotated[str | None, Means("none: the one that it was made from")] = None,
    *,
    prompts: Annotated[str, Numbers(), Means("empty: 128,1024")] = "",
    batches: Annotated[str, Numbers(), Means("empty: 1,8")] = "",
    tokens: Annotated[int | None, Means("none: 32")] = None,
    runs: Annotated[int | None, Means("none: 20")] = None,
    seconds: Annotated[float | None, Means("none: 10")] = None,
    starts: int = STARTS,
    quick: bool = False,
    dtype: Annotated[str, Means("auto: float32 on a CPU, bfloat16 on a GPU")] = "auto",
    device: Annotated[str, Means("auto: the first GPU, else the CPU")] = "auto",
    threads: Annotated[int | None, Means("none: as many as there are cores")] = None,
    results: str = "runs",
) -> SpeedReport:
    """How fast a checkpoint runs beside its original, and what memory it takes; each in a process of its own.

    prompts, batches: numbers separated by commas; tokens: decoded behind a prompt; runs, seconds: how long each is
    timed, at least; starts: how often the processes are started (of one, an interval says nothing of what another would
    give); quick: one prompt, one sequence and short turns, for tiny models. On a CPU, models run in fp32 unless told
    otherwise: bf16 products are slow there, and would flatter what is packed.
    """
    setting = setting_of(
        prompts=prompts, batches=batches, tokens=tokens, runs=runs, seconds=seconds, starts=starts, quick=quick,
        dtype=dtype, device=device, threads=threads,
    )  # fmt: skip
    opened = resolve_model(str(checkpoint))
    return speed_report(opened, original_for(opened, original), setting)


def setting_of(**words: Any) -> Setting:
    """What to measure, in words of `speed`. ValueError for what cannot be measured."""
    one = HARNESSES["speed"]
    given = {key: each.default for key, each in one.declaration.parameters.items()} | one.typed(words)
    where = resolve_device(given["device"])
    whole = Setting(prompts=(128,), batches=(1,), tokens=16, effort=QUICK) if given["quick"] else Setting()
    runs, seconds, tokens, threads = (given[key] for key in ("runs", "seconds", "tokens", "threads"))
    found = Setting(
        numbers(given["prompts"], "prompts") or whole.prompts,
        numbers(given["batches"], "batches") or whole.batches,
        whole.tokens if tokens is None else tokens,
        TimingBudget(whole.effort.runs if runs is None else runs, whole.effort.seconds if seconds is None else seconds),
        given["starts"],
        dtype_name(resolve_dtype(given["dtype"], where)),
        str(where),
        cores() if threads is None else threads,
    )
    found.points()
    return found


def speed_report(checkpoint: Checkpoint, base: Checkpoint, setting: Setting) -> SpeedReport:
    """Measure both. ValueError for other vocabularies, and for prompts that are too long for the original."""
    require_same_tokens(checkpoint, base)
    longest = max(setting.prompts) + setting.tokens
    positions = getattr(base.text_config, "max_position_embeddings", None) or longest
    if longest > positions:
        raise ValueError(
            f"prompts of {max(setting.prompts)} tokens and {setting.tokens} behind them: {base.name} was made for "
            f"{positions}. Use prompts= with shorter ones."
        )
    require_memory((base, checkpoint), DTYPES[setting.dtype], torch.device(setting.device), "to be timed in turn")
    with progress_bar("starts") as progress:
        found = compare_speed(base.folder, checkpoint.folder, setting, progress)
    name, machine = Path(base.name).name, environment()
    identity = fingerprint(checkpoint.fingerprint, base.fingerprint, asdict(setting), machine["processor"])
    return SpeedReport(checkpoint.folder.name, name, checkpoint.fingerprint, found, machine, now(), identity)
