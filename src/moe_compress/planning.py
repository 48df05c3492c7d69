"""Deciding what to do: recipes tried on a skeleton, and each stage's plan made from what it needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from moe_compress import registry
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.formats import pack_skeleton
from moe_compress.measuring import (
    SEARCH_FOLD,
    calibration_for,
    channel_observed,
    fitness,
    noise_observed,
    observed,
    parse_mix,
    unobserved,
)
from moe_compress.model.applying import check_edits, refuse_if_uneditable
from moe_compress.model.edits import Edit, KeepExperts, MergeExperts, Plan, SkipExperts, to_json
from moe_compress.model.packed import is_packed
from moe_compress.model.shapes import model_shape
from moe_compress.progressive import plan_progressively
from moe_compress.recipe import Recipe, Stage
from moe_compress.registry import Method
from moe_compress.run import Run
from moe_compress.stream.data import FOLDS
from moe_compress.stream.observed import Observed
from moe_compress.weight_stages import check_weights, gram_bytes

# Stages that put other weights side by side than were counted for a pattern.
MIXING = ("channels", "expert_merge")


@dataclass
class DryRun:
    """All edits of a recipe, with arbitrary experts in the right numbers, and the largest Gram matrices it holds."""

    edits: list[Edit] = field(default_factory=list)
    gram_bytes: int = 0


def dry_run(recipe: Recipe, model: PreTrainedModel, packed: bool = False) -> DryRun:
    """Carry the recipe out on a skeleton, which is then as the recipe leaves it. packed: so is the model, and plain.

    Raises ValueError for whatever can be known to fail before a weight is read.
    """
    found, pattern = DryRun(), ""
    for number, stage in enumerate(recipe.stages, 1):
        try:
            if pattern and stage.method in MIXING:
                raise ValueError(f"it would not leave {pattern} as it is: put it before the stage that prunes to it.")
            if registry.find(stage.method).scope == "weight":
                packed = _dry_weights(stage, model, packed, found)
            else:
                found.edits += _dry_stage(stage, model)
            pattern = stage.parameters.get("pattern") or pattern
        except ValueError as error:
            if len(recipe.stages) == 1:
                raise
            raise ValueError(f"stage {number} ({stage.method}): {error}") from error
    return found


def _dry_weights(stage: Stage, model: PreTrainedModel, packed: bool, found: DryRun) -> bool:
    """The same for one stage that changes weights; whether the model is then packed in a plain format."""
    refuse_if_uneditable(model.config)
    if packed:
        raise ValueError(
            "weights beside those that are packed in a plain format do not change any more: put this stage before the "
            "one that made them so, or pack with format=packed (of a model that is published so, use a bf16 copy)."
        )
    check_weights(stage, model)
    if stage.needs == "grams":
        needed = (each * experts for each, experts in gram_bytes(stage, model).values())
        found.gram_bytes = max(found.gram_bytes, *needed)
    edits = pack_skeleton(stage, model) if "format" in stage.parameters else []
    found.edits += edits
    return "format" in stage.parameters and not edits and is_packed(model)


def _dry_stage(stage: Stage, model: PreTrainedModel) -> Sequence[Edit]:
    """The same for one stage that changes the structure."""
    method = registry.find(stage.method)
    if method.check is None or method.scope != "model":
        return []
    refuse_if_uneditable(model.config)
    shape = model_shape(model)
    rerouted = [moe.layer for moe in shape.moe if moe.rerouted]
    if rerouted and stage.needs == "probe":
        raise ValueError(
            f"{stage.method} has to know what every expert does alone, but layers {rerouted[:5]} were merged with "
            "router=sum, hold constants or skip experts: put this stage before that one."
        )
    planned: list[Edit] = method.check(shape, **stage.parameters).edits
    check_edits(model, planned)
    return planned


def plan_stage(stage: Stage, checkpoint: Checkpoint, run: Run) -> tuple[Plan, dict[str, Any]]:
    """What a stage will do, and a description of the calibration it used ({} for none)."""
    method = registry.find(stage.method)
    if stage.needs == "noise":
        return method.run(noise_observed(checkpoint, run), **stage.parameters), {}
    if stage.needs in ("channels", "gradients"):
        seen, description = channel_observed(checkpoint, run, stage.needs == "gradients")
        return method.run(seen, **stage.parameters), description
    if stage.needs in ("weights", "nothing"):
        return method.run(unobserved(checkpoint, stage.needs == "weights"), **stage.parameters), {}
    if stage.parameters.get("propagate") == "compressed":
        return plan_progressively(stage, checkpoint, run)
    calibration = calibration_for(checkpoint, run, stage.needs == "probe")
    mix = parse_mix(run.options.mix)
    description = {**calibration.description, "fingerprint": calibration.identity, "mix": mix}
    if stage.parameters.get("budget") == "search":
        seen = observed(checkpoint, calibration, mix, SEARCH_FOLD)
        seen = dataclasses.replace(seen, evaluate=fitness(checkpoint, run))
        return method.run(seen, **stage.parameters), description
    plan = method.run(observed(checkpoint, calibration, mix), **stage.parameters)
    if stage.needs == "text":
        again = (observed(checkpoint, calibration, mix, fold) for fold in range(FOLDS))
        _report_stability(plan, method, stage, again)
    return plan, description


def _report_stability(plan: Plan, method: Method, stage: Stage, without: Iterable[Observed]) -> None:
    """How much of the choice stays the same when a quarter of the text is left out."""
    chosen, overlaps = _choices(plan.edits), []
    if not chosen:
        return
    for seen in without:
        try:
            again = _choices(method.run(seen, **stage.parameters).edits)
        except ValueError:
            continue  # what is left of the text does not do for this recipe, for example with unseen=error
        overlaps.append(len(chosen & again) / len(chosen | again))
    if overlaps:
        plan.report["same_choice_without_a_quarter_of_the_text"] = sum(overlaps) / len(overlaps)


def _choices(edits: Sequence[Edit]) -> set[Any]:
    """What was chosen, piece by piece: every expert that stays, every other edit as a whole."""
    found: set[Any] = set()
    for edit in edits:
        if isinstance(edit, KeepExperts):
            found |= {(edit.layer, expert) for expert in edit.experts}
        elif isinstance(edit, MergeExperts):
            found |= {(edit.layer, frozenset(group)) for group in edit.groups}
        elif not isinstance(edit, SkipExperts):  # a threshold is no choice
            found.add(repr(to_json(edit)))
    return found
