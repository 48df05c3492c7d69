"""What the parts of one run share: its options, its arithmetic, its log and its folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_compress.recipe import Options
from moe_compress.runtime import RunLog, resolve_device, resolve_dtype


@dataclass
class Run:
    """One run of a command."""

    options: Options
    log: RunLog

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
