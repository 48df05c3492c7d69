"""What the parts of one run share: its options, its arithmetic, its log and what it has cost so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_compress.recipe import Options
from moe_compress.runtime import RunLog, resolve_device, resolve_dtype


@dataclass
class Run:
    """One run of a command."""

    options: Options
    log: RunLog
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return resolve_device(self.options.device)

    @property
    def dtype(self) -> torch.dtype:
        """In which precision."""
        return resolve_dtype(self.options.dtype, self.device)

    def results(self, folder: str) -> Path:
        """A folder under results/."""
        return Path(self.options.results) / folder

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds that the block takes to `seconds[what]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started
