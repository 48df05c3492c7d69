"""The FLOPs harness: FLOPs and sizes by component from a config, and the report as Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from moe_compress.checkpoints.load import load_as_run, require_memory
from moe_compress.checkpoints.quantization_config import packed_edits, scale_bytes
from moe_compress.checkpoints.reader import architecture_values, open_checkpoint
from moe_compress.checkpoints.resolve import config_folder
from moe_compress.edits.apply import apply_edits
from moe_compress.evaluation.flops.torch_check import Agreement
from moe_compress.evaluation.flops.torch_check import check as check_flops
from moe_compress.evaluation.harnesses import harness
from moe_compress.evaluation.saved_report import SavedReport
from moe_compress.models import hf
from moe_compress.models.components import Component, absorbed_decode, components
from moe_compress.reports import table_formats
from moe_compress.reports.table_formats import Cells
from moe_compress.utils.choices import AtLeast

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
MEANING = (
    "Two FLOPs a multiply-add; norms, activations and softmax are not counted. Prefill: every token attends to all, "
    "the full square and not its causal half, with a sliding window as well; the head on every token. Decode: a step "
    "of one token a sequence, the context holding that token; no more of it than the window where there is one; what "
    "latent attention expands again is counted. Share: of the prefill."
)
ESTIMATE = (
    "\\* An estimate: recurrent layers scan in other ways in other kernels, and where experts are skipped or replaced, "
    "the text decides how many run."
)


ABSORBED = (
    "Latent attention: transformers expands everything that is cached anew at every step, which the table counts. "
    "Engines multiply queries with what is cached as it is (absorbed): a step then takes {step}FLOPs in all."
)


def as_markdown(report: Mapping[str, Any]) -> str:
    """A row a component and one for all, what is counted, and torch's own count where it was asked for."""
    tokens, context, batch = report["tokens"], report["context"], report["batch"]
    title = f"### {report['model']}\n\nPrefill of {batch} x {tokens:,} tokens, a step at {context:,} of context."
    total = report["total"]
    shown = [each for each in report["components"] if any(each[key] for key in ("parameters", "bytes", "prefill"))]
    cells = Cells.of([_row(each, total["prefill"]) for each in [*shown, {"name": "all", **total}]])
    parts = [title, table_formats.markdown(cells), MEANING]
    if report.get("absorbed_decode") is not None:
        parts.append(ABSORBED.format(step=_short(report["absorbed_decode"])))
    if any(each["estimate"] for each in shown):
        parts.append(ESTIMATE)
    if report["check"] is not None:
        parts.append(_agreement(report["check"]))
    return "\n\n".join(parts) + "\n"


def _row(each: Mapping[str, Any], prefill: int) -> dict[str, str]:
    return {
        "component": each["name"] + (" \\*" if each.get("estimate") else ""),
        "parameters": _short(each["parameters"]),
        "stored": _short(each["bytes"], BINARY),
        "touched by a token": _short(each["touched"]),
        "prefill FLOPs": _short(each["prefill"]),
        "share": f"{each['prefill'] / max(prefill, 1):.1%}",
        "decode FLOPs": _short(each["decode"]),
    }


def _short(count: int, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """A count in the largest unit that it reaches."""
    for size, unit in units:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count}"


def _agreement(found: Sequence[Mapping[str, Any]]) -> str:
    """What torch counted, and a verdict."""
    rows = [
        {
            "component": each["component"],
            "phase": each["phase"],
            "ours": f"{each['analytic']:,}",
            "torch": f"{each['counted']:,}",
            "difference": f"{each['difference']:.3%}" if each["compared"] else "not compared",
        }
        for each in found
    ]
    apart = [f"{each['component']} ({each['phase']})" for each in found if not each["agrees"]]
    verdict = f"differs from ours: {', '.join(apart)}." if apart else "agrees to 0.1 % wherever it is comparable."
    verdict = f"Torch's own counter {verdict} Its decode step comes right behind the prefill."
    return f"{verdict}\n\n" + table_formats.markdown(Cells.of(rows))


# Tokens for which a model whose experts need their weights really runs.
RUN_TOKENS = 128
SUMMED = ("parameters", "bytes", "touched", "prefill", "decode")


@dataclass(frozen=True)
class FlopsReport(SavedReport):
    """All components, for `batch` sequences of `tokens` tokens and a step at `context`; check: None where not asked.

    absorbed_decode: FLOPs of that step where latent attention is absorbed, None without latent attention.
    """

    model: str
    tokens: int
    context: int
    batch: int
    components: tuple[Component, ...]
    check: tuple[Agreement, ...] | None = None
    absorbed_decode: int | None = None

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

    @property
    def exit_code(self) -> int:
        """1 where torch's counter differs."""
        return int(self.agrees is False)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        checked = None
        if self.check is not None:
            checked = [{**asdict(e), "difference": e.difference, "agrees": e.agrees} for e in self.check]
        found = {**asdict(self), "total": {what: self.total(what) for what in SUMMED}, "check": checked}
        if self.absorbed_decode is None:
            del found["absorbed_decode"]
        return found

    def markdown(self) -> str:
        """As a table, with what is counted below."""
        return as_markdown(self.to_json())


@harness("flops")
def flops(
    model: str | Path,
    /,
    tokens: Annotated[int, AtLeast(1)] = 2048,
    context: Annotated[int, AtLeast(1)] = 2048,
    batch: Annotated[int, AtLeast(1)] = 1,
    check: bool = False,
    results: str = "runs",
) -> FlopsReport:
    """Count a model's FLOPs, parameters and bytes by component, from its config alone: plain, edited or packed.

    tokens: of each of `batch` sequences in the prefill; context: of a decode step; check: count with torch's counter as
    well. Raises ValueError for a model that is not there or not known.
    """
    folder = config_folder(str(model))
    values = architecture_values(folder)
    stored = hf.stored_dtype(values)
    skeleton = hf.skeleton(hf.config_from(values), stored)
    agreement = tuple(_checked(skeleton, folder, tokens)) if check else None
    apply_edits(skeleton, packed_edits(skeleton, values))
    found = components(skeleton, tokens, context, batch, stored, scale_bytes=scale_bytes(values))
    absorbed = absorbed_decode(skeleton, sum(each.decode for each in found), context, batch)
    return FlopsReport(str(model), tokens, context, batch, tuple(found), agreement, absorbed)


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
