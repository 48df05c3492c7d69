"""Deciding what to do: recipes tried on a skeleton, and each stage's plan made from what it needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from moe_compress.calibration.collect import calibration_for, channel_observed, noise_observed, observed, unobserved
from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.search_objective import SEARCH_FOLD, agreement_objective
from moe_compress.compression.sequential_planning import plan_progressively
from moe_compress.data.windows import FOLDS, parse_mix
from moe_compress.edits.edits import Edit, KeepExperts, MakeDense, MergeExperts, Plan, SkipExperts, to_json
from moe_compress.methods import registry
from moe_compress.methods.registry import Method
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run


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
    calibration = calibration_for(checkpoint, run, stage.needs == "outputs")
    mix = parse_mix(run.options.mix)
    description = {**calibration.description, "fingerprint": calibration.identity, "mix": mix}
    if stage.parameters.get("budget") == "search":
        seen = observed(checkpoint, calibration, mix, SEARCH_FOLD)
        seen = dataclasses.replace(seen, evaluate=agreement_objective(checkpoint, run))
        return method.run(seen, **stage.parameters), description
    plan = method.run(observed(checkpoint, calibration, mix), **stage.parameters)
    if stage.needs == "text":
        again = (observed(checkpoint, calibration, mix, fold) for fold in range(FOLDS))
        _report_stability(plan, method, stage, again)
    return plan, description


def _report_stability(plan: Plan, method: Method, stage: Stage, without: Iterable[ModelStatistics]) -> None:
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
        if isinstance(edit, KeepExperts | MakeDense):
            found |= {(edit.layer, expert) for expert in edit.experts}
        elif isinstance(edit, MergeExperts):
            found |= {(edit.layer, frozenset(group)) for group in edit.groups}
        elif not isinstance(edit, SkipExperts):  # a threshold is no choice
            found.add(repr(to_json(edit)))
    return found
