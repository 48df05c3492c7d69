"""Speed of a checkpoint beside its original: what is asked, and the record of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress.checkpoint.load import require_memory
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.harness.speed import QUICK, Setting, compare_speed, cores, numbers
from moe_compress.harness.timing import STARTS, Effort
from moe_compress.kept import Identified
from moe_compress.registry import coerce
from moe_compress.report.record import environment, now
from moe_compress.report.speed import as_markdown
from moe_compress.run import require_same_tokens
from moe_compress.runtime import DTYPES, dtype_name, fingerprint, resolve_device, resolve_dtype
from moe_compress.terminal import progress_bar


@dataclass(frozen=True)
class SpeedReport(Identified):
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


def setting_of(
    *,
    prompts: str = "",
    batches: str = "",
    tokens: int | str | None = None,
    runs: int | str | None = None,
    seconds: float | str | None = None,
    starts: int | str = STARTS,
    quick: bool | str = False,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | str | None = None,
) -> Setting:
    """What to measure, in words. quick: one prompt, one sequence and short turns, for tiny models.

    starts: how often the processes are started; of one, an interval says nothing of what another would give.

    On a CPU, models run in fp32 unless told otherwise: bf16 products are slow there, and would flatter what is packed.
    """
    where = resolve_device(device)
    short = coerce(bool, quick, "quick")
    whole = Setting(prompts=(128,), batches=(1,), tokens=16, effort=QUICK) if short else Setting()
    effort = Effort(
        whole.effort.runs if runs is None else coerce(int, runs, "runs"),
        whole.effort.seconds if seconds is None else coerce(float, seconds, "seconds"),
    )
    found = Setting(
        numbers(prompts, "prompts") if prompts else whole.prompts,
        numbers(batches, "batches") if batches else whole.batches,
        whole.tokens if tokens is None else coerce(int, tokens, "tokens"),
        effort,
        coerce(int, starts, "starts"),
        dtype_name(resolve_dtype(dtype, where)),
        str(where),
        cores() if threads is None else coerce(int, threads, "threads"),
    )
    found.points()
    return found


def speed_report(checkpoint: Checkpoint, base: Checkpoint, setting: Setting) -> SpeedReport:
    """Measure both. ValueError for other vocabularies, and for prompts that are too long for the original."""
    require_same_tokens(checkpoint, base)
    longest = max(setting.prompts) + setting.tokens
    positions = getattr(base.config, "max_position_embeddings", None) or longest
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
