"""FLOPs and sizes of a model by component, from its config alone: what `flops` on the command line shows."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress import registry
from moe_compress.checkpoint.load import load_as_run, require_memory
from moe_compress.checkpoint.locate import config_folder
from moe_compress.checkpoint.reader import architecture_values, open_checkpoint
from moe_compress.harness.components import Component, components
from moe_compress.harness.flops import Agreement
from moe_compress.harness.flops import check as check_flops
from moe_compress.kept import Kept
from moe_compress.model import hf
from moe_compress.model.applying import apply_edits
from moe_compress.model.packing_config import packed_edits, scale_bytes
from moe_compress.report.flops import as_markdown
from moe_compress.runtime import DTYPES

# Tokens for which a model whose experts need their weights really runs.
RUN_TOKENS = 128
SUMMED = ("parameters", "bytes", "touched", "prefill", "decode")


@dataclass(frozen=True)
class FlopsReport(Kept):
    """All components, for `batch` sequences of `tokens` tokens and a step at `context`; check: None where not asked."""

    model: str
    tokens: int
    context: int
    batch: int
    components: tuple[Component, ...]
    check: tuple[Agreement, ...] | None = None

    @property
    def file_name(self) -> str:
        """The last part of the name or path."""
        return Path(os.path.abspath(self.model)).name

    def total(self, what: str) -> int:
        """Sum over components of parameters, bytes, touched, prefill or decode."""
        return sum(getattr(each, what) for each in self.components)

    @property
    def agrees(self) -> bool | None:
        """Whether torch's counter says the same wherever the two are comparable; None if it was not asked."""
        return None if self.check is None else all(each.agrees for each in self.check)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        checked = None
        if self.check is not None:
            checked = [{**asdict(e), "difference": e.difference, "agrees": e.agrees} for e in self.check]
        return {**asdict(self), "total": {what: self.total(what) for what in SUMMED}, "check": checked}

    def markdown(self) -> str:
        """As a table, with what is counted below."""
        return as_markdown(self.to_json())


def flops(
    model: str | Path,
    /,
    tokens: int | str = 2048,
    context: int | str = 2048,
    batch: int | str = 1,
    check: bool | str = False,
) -> FlopsReport:
    """Count a zoo model, folder or hub id, plain, edited or packed, from its config.json; nothing is read but that.

    tokens: of each of `batch` sequences in the prefill; context: of a decode step; check: count with torch's counter as
    well. Raises ValueError for a model that is not there or not known, and for numbers below 1.
    """
    tokens, context, batch = _positive("tokens", tokens), _positive("context", context), _positive("batch", batch)
    checking = registry.coerce(bool, check, "check")
    folder = config_folder(str(model))
    values = architecture_values(folder)
    stored = DTYPES.get(str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    skeleton = hf.skeleton(hf.config_from(values), stored)
    agreement = tuple(_checked(skeleton, folder, tokens)) if checking else None
    apply_edits(skeleton, packed_edits(skeleton, values))
    found = components(skeleton, tokens, context, batch, stored, scale_bytes=scale_bytes(values))
    return FlopsReport(str(model), tokens, context, batch, tuple(found), agreement)


def _positive(name: str, value: int | str) -> int:
    number: int = registry.coerce(int, value, name)
    if number < 1:
        raise ValueError(f"{name}={number}: a whole number from 1 up is needed.")
    return number


def _checked(skeleton: PreTrainedModel, folder: Path, tokens: int) -> list[Agreement]:
    """On the skeleton; where that cannot run and there are weights, on these."""
    try:
        return check_flops(skeleton, tokens)
    except ValueError:
        if not any(folder.glob("*.safetensors")):
            raise
    checkpoint, cpu = open_checkpoint(folder), torch.device("cpu")
    require_memory([checkpoint], torch.float32, cpu, "really runs for this check")
    model = load_as_run(checkpoint, torch.float32, cpu)
    return check_flops(model, min(tokens, RUN_TOKENS))
