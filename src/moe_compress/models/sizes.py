"""The four sizes of a model: stored parameters, bytes, parameters touched per token, FLOPs per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress.models.components import components


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """parameters: stored; bytes: on disk; touched: distinct parameters one token uses; flops_per_token at `context`."""

    parameters: int
    bytes: int
    touched: int
    flops_per_token: int
    context: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def sizes(
    model: PreTrainedModel, context: int, stored: torch.dtype, scale_bytes: Mapping[int, float] | None = None
) -> Sizes:
    """Count a model or a skeleton; `context` tokens attend to each other, `stored` is the dtype on disk.

    scale_bytes: by bits, what a scale of packed weights takes there, if not that.
    """
    found = components(model, context, context, 1, stored, scale_bytes=scale_bytes)
    return Sizes(
        parameters=sum(each.parameters for each in found),
        bytes=sum(each.bytes for each in found),
        touched=sum(each.touched for each in found),
        flops_per_token=sum(each.prefill for each in found) // context,
        context=context,
    )
