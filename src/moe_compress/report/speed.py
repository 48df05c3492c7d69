"""Speed as Markdown, from its JSON. This module knows nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

MIB = 2**20
WHAT = {"prefill": "time to the first token", "decode": "time per decoded token"}


def as_markdown(report: Mapping[str, Any]) -> str:
    """Times and their ratios, memory, and how it was measured; a busy machine is said first, and loudly."""
    found, parts = report["found"], [f"### {report['model']} beside {report['original']}"]
    before = found["machine"]["before"]
    if before["busy"]:
        parts.append(f"**BUSY MACHINE: others used {before['used']:.0%} of the processor before it began.**")
    parts += [_table([_times(point, what) for point in found["points"] for what in WHAT])]
    parts += [_table([_memory(point, side) for point in found["points"] for side in ("original", "variant")])]
    return "\n\n".join([*parts, _how(found), MEANING]) + "\n"


MEANING = (
    "Speedup: median of the ratios of turns (above 1: faster than the original), with its 95 % bootstrap interval. "
    "Read per step: weights that a step of decoding is expected to touch, and the cache. Activations: the peak above "
    "weights and cache."
)


def _table(rows: list[dict[str, str]]) -> str:
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def _times(point: Mapping[str, Any], what: str) -> dict[str, str]:
    times = point[what]
    low, high = times["speedup_interval"]
    return {
        "sequences x prompt": f"{point['batch']} x {point['prompt']}",
        "what": WHAT[what],
        "original": f"{1000 * times['original_seconds']:.2f} ms",
        "this": f"{1000 * times['variant_seconds']:.2f} ms",
        "speedup": f"{times['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        "tokens/s": f"{times['original_tokens_per_second']:,.0f} -> {times['variant_tokens_per_second']:,.0f}",
        "turns": f"{times['pairs']}",
    }


def _memory(point: Mapping[str, Any], side: str) -> dict[str, str]:
    memory = point["memory"][side]
    names = {"weights": "weights", "cache": "KV cache", "activations": "activations", "step_bytes": "read per step"}
    cells = {f"{title} MiB": f"{memory[name] / MIB:,.2f}" for name, title in names.items()}
    return {"sequences x prompt": f"{point['batch']} x {point['prompt']}", "model": side, **cells}


def _how(found: Mapping[str, Any]) -> str:
    setting, machine = found["setting"], found["machine"]["before"]
    clock = f", {machine['megahertz']:,.0f} MHz" if machine["megahertz"] else ""
    kernels = "; ".join(f"{side}: {_kernels(found[side])}" for side in ("original", "variant"))
    energy = {str(point[what]["joules_of_both"]) for point in found["points"] for what in WHAT}
    return (
        f"{setting['dtype']} on {setting['device']}, threads: {setting['threads'] or 'all'}; load "
        f"{machine['load']:.2f} on {machine['cores']} cores before{clock}. {kernels}. Energy of both, J: "
        f"{', '.join(sorted(energy))}."
    )


def _kernels(about: Mapping[str, Any]) -> str:
    packed = "".join(f", {count} matrices of {name}" for name, count in about["packed"].items())
    return f"attention {about['attention']}, experts {about['experts']}{packed}"
