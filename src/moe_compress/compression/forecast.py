"""What a recipe would give, from config.json alone: sizes before and after, the form, memory. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import QUANTIZATION
from moe_compress.checkpoints.quantization_config import packed_edits, scale_bytes
from moe_compress.checkpoints.reader import architecture_values
from moe_compress.compression.dry_run import DryRun, dry_run
from moe_compress.edits.apply import apply_for_counting
from moe_compress.edits.edits import KeepExperts, SkipExperts
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.methods import registry
from moe_compress.models import hf
from moe_compress.models.prediction_layers import prediction_layers
from moe_compress.models.sizes import Sizes, sizes
from moe_compress.recipes.recipe import Recipe
from moe_compress.utils.devices import resolve_device, resolve_dtype
from moe_compress.utils.files import gigabytes

LAYERS_AT_PEAK = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Sizes before and after, whether stock transformers loads the result, peak memory in bytes.

    notes: what the numbers do not say, in sentences.
    """

    model: str
    before: Sizes
    after: Sizes
    form: str
    layer_bytes: int
    outer_bytes: int
    boundary_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Above the bare process: layers in the making, embeddings and head, hidden states between layers."""
        return int(LAYERS_AT_PEAK * self.layer_bytes) + self.outer_bytes + self.boundary_bytes

    def markdown(self) -> str:
        """The numbers as a table, with what they mean below."""
        return as_markdown(self)


def forecast(recipe: Recipe, folder: Path) -> Forecast:
    """Check the recipe against the model's shapes and count what it would leave."""
    options = recipe.options
    values = architecture_values(folder)
    config = hf.config_from(values)
    stored = hf.stored_dtype(values)
    model = hf.skeleton(config, stored, options.attn)
    compute = resolve_dtype(options.dtype, resolve_device(options.device))
    itemsize = torch.finfo(compute).bits // 8
    layer = max(sum(t.numel() for t in layer.state_dict().values()) for layer in hf.decoder_layers(model))
    inside = sum(t.numel() for layer in hf.decoder_layers(model) for t in layer.state_dict().values())
    before = _sizes(hf.skeleton(config, stored) if values.get(QUANTIZATION) else model, values, options.length, stored)
    dry = dry_run(recipe, model, values)
    form = resulting_config(dry.values, dry.edits)
    left = hf.skeleton(hf.config_from(form.values), stored) if form.fill else dry.model
    return Forecast(
        model=options.model,
        before=before,
        after=_sizes(left, dry.values, options.length, stored),
        form="plain" if form.plain else "edited",
        layer_bytes=layer * itemsize,
        outer_bytes=(before.parameters - inside) * itemsize,
        boundary_bytes=options.samples * options.length * config.get_text_config().hidden_size * itemsize,
        notes=(*_notes(recipe, dry), *_prediction_notes(values, hf.knows_prediction_layers(model), dry)),
    )


def _sizes(model: PreTrainedModel, values: Mapping[str, Any], context: int, stored: torch.dtype) -> Sizes:
    """Counts of a skeleton in plain numbers, which is then packed as the config says."""
    apply_for_counting(model, packed_edits(model, values))
    return sizes(model, context, stored, scale_bytes(values))


def _notes(recipe: Recipe, dry: DryRun) -> tuple[str, ...]:
    """What the sizes leave open."""
    said = (registry.find(stage.method).forecast_note for stage in recipe.stages)
    notes = [*dict.fromkeys(note for note in said if note)]
    if dry.gram_bytes:
        taken = gigabytes(dry.gram_bytes)
        notes.append(f"Gram matrices of a layer take {taken} on top; experts_at_once= holds fewer of them.")
    if dry.output_bytes:
        taken = gigabytes(dry.output_bytes)
        notes.append(
            f"Before that, second moments of a layer's gradients take {taken}; grams=pooled holds one for all."
        )
    if any(isinstance(edit, SkipExperts) for edit in dry.edits):
        notes.append("How many experts are skipped depends on the text: what that saves per token is not counted.")
    if any(isinstance(edit, KeepExperts) and edit.novices for edit in dry.edits):
        notes.append(
            "How many tokens meet a mean output depends on the text: what that saves per token is not counted."
        )
    return tuple(notes)


def _prediction_notes(values: Mapping[str, Any], known: bool, dry: DryRun) -> list[str]:
    """What becomes of multi-token-prediction layers, where the config counts some, or the architecture knows them."""
    count = prediction_layers(values)
    if not count and not known:
        return []
    which = f"Its multi-token-prediction layers ({count} by its config) are"
    if not count:
        which = "Multi-token-prediction layers, if it stores any, are"
    fate = "copied as they are" if dry.keeps_beside else "left out, and its config will say so"
    return [f"{which} not counted here; they are {fate}."]


def as_markdown(found: Forecast) -> str:
    """The forecast as a table, with what the numbers mean below."""
    sides = (found.before, found.after)
    rows = [
        ("stored parameters", *(_short(s.parameters, "B") for s in sides)),
        ("on disk", *(gigabytes(s.bytes) for s in sides)),
        ("touched per token", *(_short(s.touched, "B") for s in sides)),
        (f"FLOPs per token at {found.before.context} tokens", *(_short(s.flops_per_token, "G") for s in sides)),
    ]
    lines = [f"### {found.model}", "", "| | before | after |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"{found.form} checkpoint. Peak memory about {gigabytes(found.peak_bytes)} above the bare process: "
        f"{LAYERS_AT_PEAK} layers of {gigabytes(found.layer_bytes)}, embeddings and head "
        f"{gigabytes(found.outer_bytes)}, hidden states of the calibration text {gigabytes(found.boundary_bytes)}.",
    ]
    lines += [line for note in found.notes for line in ("", note)]
    return "\n".join(lines)


def _short(count: int, billions: str) -> str:
    """A count in thousands, millions or billions."""
    for size, unit in ((10**9, billions), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return f"{count / 1000:.3f} K"
