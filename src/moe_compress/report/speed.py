"""Speed as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_compress.report import formats
from moe_compress.report.beside import STARTS_NEEDED
from moe_compress.report.table import SAME

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
    return formats.markdown(pd.DataFrame(rows))


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
