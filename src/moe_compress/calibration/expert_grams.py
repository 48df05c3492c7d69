"""Gram matrices of a layer's experts, made one at a time when they are asked for, from sums in memory or on disk.

E experts, I inputs. H_e = (1 - s) S_e + s (n_e / n) S with s = shrink / (shrink + n_e): S_e an expert's own sum over
n_e tokens, S that of all experts over n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from moe_compress.checkpoints.safetensors_file import write_shard


class Sums(Protocol):
    """Sums of outer products [I, I], one expert at a time."""

    def __getitem__(self, e: int, /) -> Tensor: ...


class SumsOnDisk:
    """Sums that lie in files, each of a range of experts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.files: list[tuple[range, Path]] = []

    def keep(self, experts: range, file: Path, total_BII: Tensor) -> None:
        """Write the sums of a range of experts."""
        write_shard(file, {"total": total_BII.contiguous()})
        self.files.append((experts, file))

    def __getitem__(self, e: int, /) -> Tensor:
        experts, file = next(entry for entry in self.files if e in entry[0])
        with safe_open(file, "pt") as kept:
            found: Tensor = kept.get_slice("total")[e - experts.start]
        return found.to(self.device)

    def remove(self) -> None:
        """The files are needed no more."""
        for _, file in self.files:
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class SpreadPool:
    """One Gram matrix of all experts [I, I], and each expert's own sums of squares [E, I] on its diagonal.

    Correlations are then those of the pool: what is left where no layer's Gram matrices would fit.
    """

    pooled_II: Tensor
    squares_EI: Tensor

    def __getitem__(self, e: int, /) -> Tensor:
        pooled_I = self.pooled_II.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
        scale_I = (self.squares_EI[e] / pooled_I).sqrt()
        return self.pooled_II * scale_I[:, None] * scale_I


@dataclass(frozen=True, slots=True)
class ExpertGrams:
    """H_e of every expert.

    sums, counts: S_e and n_e; least: tokens with fewer of which an expert takes the pooled mean alone (use_pooled), as
    often as it saw tokens but once at least, or else nothing, which stands for plain distance.
    """

    sums: Sums
    counts: Sequence[int]
    pooled_II: Tensor
    pooled_count: int
    shrink: float
    least: int
    use_pooled: bool

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def rare(self) -> list[int]:
        """Experts that have seen too few tokens."""
        return [e for e, count in enumerate(self.counts) if count < self.least]

    def __getitem__(self, e: int, /) -> Tensor:
        count, mean_II = self.counts[e], self.pooled_II / max(self.pooled_count, 1)
        if count < self.least:
            return mean_II * max(count, 1) if self.use_pooled else torch.zeros_like(mean_II)
        if not self.shrink:
            return self.sums[e]
        return (self.sums[e] + self.shrink * mean_II) * (count / (count + self.shrink))


@dataclass(frozen=True, slots=True)
class ExpertMeans:
    """The same divided by the tokens of each expert; sums of none stay as they are."""

    grams: ExpertGrams

    def __len__(self) -> int:
        return len(self.grams)

    def __getitem__(self, e: int, /) -> Tensor:
        return self.grams[e] / max(self.grams.counts[e], 1)
