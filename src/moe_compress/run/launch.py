"""How the processes of one command were started: what torchrun and accelerate leave in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# What torchrun, and accelerate by it, sets of every process.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ElsewhereError(OSError):
    """Something that another process of the same command has met; what was kept of the work stays."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Which of how many processes this is, and the same among those of this machine.

    sharded: layers are to be shared out among them.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    sharded: bool = False


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch that this process belongs to; a single one where there is none."""
    if any(name not in environment for name in LAUNCHED):
        return Launch()
    rank, count, local_rank, local_count = (int(environment[name]) for name in LAUNCHED)
    return Launch(rank, count, local_rank, local_count, _is_true(environment, "ACCELERATE_USE_FSDP"))


def require_known(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError for what accelerate may be told and nothing would come of."""
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("distributed_type: DEEPSPEED is not supported: use MULTI_GPU or FSDP.")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(
            f"mixed_precision: {precision} would do nothing: say 'no' (dtype= and words of stages are for that)."
        )


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true")
