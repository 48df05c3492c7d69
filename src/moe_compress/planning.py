"""Deciding what to do: recipes tried on a skeleton, calibration found or made, plans made, saved and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress import registry
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.model import hf
from moe_compress.model.edits import Edit, Plan, apply_edits, from_json, refuse_if_uneditable, to_json
from moe_compress.model.families import family_of
from moe_compress.model.moe import moe_shapes, moe_view, weight_sums
from moe_compress.recipe import Recipe, Stage
from moe_compress.run import Run
from moe_compress.runtime import log, one_of, read_json
from moe_compress.stream.calibration import (
    Calibration,
    calibrate,
    calibration_identity,
    component_weights,
    kept,
    mix_components,
)
from moe_compress.stream.data import FOLDS
from moe_compress.stream.fold import StreamedLayers
from moe_compress.stream.observers import LayerSums
from moe_compress.terminal import progress_bar

PLAN_VERSION = 1
Sums = Mapping[int, Mapping[str, torch.Tensor]]


def dry_run(recipe: Recipe, model: PreTrainedModel) -> list[Edit]:
    """Carry the recipe out on a skeleton, with arbitrary experts in the right numbers; returns all edits.

    Raises ValueError for whatever can be known to fail before a weight is read.
    """
    edits: list[Edit] = []
    for stage in recipe.stages:
        method = registry.find(stage.method)
        if method.check is None:
            continue
        refuse_if_uneditable(model.config)
        shapes = moe_shapes(model)
        if not shapes:
            raise ValueError(f"{type(model).__name__} has no layer whose experts can be told apart.")
        planned = method.check(shapes, **stage.parameters).edits
        apply_edits(model, planned)
        edits += planned
    return edits


def plan_stage(stage: Stage, checkpoint: Checkpoint, run: Run) -> tuple[Plan, dict[str, Any]]:
    """What a stage will do, and a description of the calibration it used ({} for none)."""
    method = registry.find(stage.method)
    if stage.needs != "text":
        sums = _weight_sums(checkpoint) if stage.needs == "weights" else {}
        return method.run(_layers(checkpoint, sums), **stage.parameters), {}
    calibration = calibration_for(checkpoint, run)
    mix = parse_mix(run.options.mix)
    layers = _mixed(checkpoint, calibration, mix, None)
    plan = method.run(layers, **stage.parameters)
    stays = _kept(plan.edits, layers)
    overlaps = []
    for fold in range(FOLDS):
        try:
            without = method.run(_mixed(checkpoint, calibration, mix, fold), **stage.parameters)
        except ValueError:
            continue  # what is left of the text does not do for this recipe, for example with unseen=error
        again = _kept(without.edits, layers)
        overlaps.append(len(stays & again) / len(stays | again))
    if overlaps:
        plan.report["same_choice_without_a_quarter_of_the_text"] = sum(overlaps) / len(overlaps)
    return plan, {**calibration.description, "fingerprint": calibration.identity, "mix": mix}


def _kept(edits: Sequence[Edit], layers: Sequence[LayerSums]) -> set[tuple[int, int]]:
    """(layer, expert) of everything that stays."""
    by_layer: dict[int, Sequence[int]] = {layer.shape.layer: range(layer.shape.num_experts) for layer in layers}
    by_layer |= {edit.layer: edit.experts for edit in edits}
    return {(layer, expert) for layer, experts in by_layer.items() for expert in experts}


def _mixed(
    checkpoint: Checkpoint, calibration: Calibration, mix: Mapping[str, float], left_out: int | None
) -> list[LayerSums]:
    weights = component_weights(calibration, mix, left_out)
    return _layers(checkpoint, {i: mix_components(table, weights) for i, table in calibration.layers.items()})


def _layers(checkpoint: Checkpoint, sums: Sums) -> list[LayerSums]:
    model = hf.skeleton(checkpoint.config, checkpoint.stored_dtype)
    gate = family_of(checkpoint.config).paper_gate
    return [LayerSums(shape, sums.get(shape.layer, {}), checkpoint.num_layers, gate) for shape in moe_shapes(model)]


def _weight_sums(checkpoint: Checkpoint) -> Sums:
    """Sums over weights alone: one layer at a time, no forward."""
    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
    family = family_of(checkpoint.config)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            view = moe_view(layer, family)
            if view is not None:
                found[index] = {f"weight_{name}": value for name, value in weight_sums(view).items()}
    return found


# --- calibration ----------------------------------------------------------------------------------------------


def parse_mix(text: str, domains: Sequence[str] | None = None) -> dict[str, float]:
    """`prose:2,code:1` -> shares of the domains; empty for none. ValueError for a domain that the text lacks."""
    mix: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.partition(":")
        try:
            mix[name.strip()] = float(share)
        except ValueError as error:
            raise ValueError(f"mix={text}: write domain:share,domain:share, such as prose:2,code:1.") from error
    if mix and not (0 < sum(mix.values()) < math.inf and min(mix.values()) >= 0):
        raise ValueError(f"mix={text}: shares are numbers from 0 up, and not all 0.")
    for name in mix if domains is not None else ():
        one_of(name, domains or (), "domain of the calibration text")
    return mix


def calibration_for(checkpoint: Checkpoint, run: Run) -> Calibration:
    """The artefact of an earlier run on the same model, text and arithmetic; else one pass makes it."""
    windows = run.windows("calibration", checkpoint)
    identity = calibration_identity(checkpoint, windows, run.dtype, run.device, run.options.attn)
    path = run.results("calibrations") / f"{identity}.safetensors"
    earlier = kept(path)
    if earlier is not None:
        log.info("calibration: %d tokens already measured, no forward needed (%s).", windows.tokens, path)
        return earlier
    log.info("calibration: %d tokens of %s (%s).", windows.tokens, run.options.data, windows.fingerprint)
    with progress_bar("measuring") as progress:
        layers = StreamedLayers(checkpoint, run.device, run.dtype, run.options.attn)
        calibration = calibrate(checkpoint, layers, windows, path, identity, progress)
    run.log.event("calibrated", path=str(path), **calibration.description)
    return calibration


# --- plans as files ---------------------------------------------------------------------------------------------


def plan_values(plan: Plan, base: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A plan as JSON that a person can read and change; the edits are what counts."""
    return {
        "version": PLAN_VERSION,
        "method": method,
        "base": dict(base),
        "edits": [to_json(edit) for edit in plan.edits],
        "scores": {str(layer): values for layer, values in plan.scores.items()},
        "report": plan.report,
    }


def read_plan(path: Path) -> tuple[list[Edit], dict[str, Any]]:
    """(edits, the model they were made for) of a plan file."""
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("edits"), list) or "base" not in values:
        raise ValueError(f"{path} is not a plan of moe-compress: it needs `base` and a list of `edits`.")
    if values.get("version") != PLAN_VERSION:
        raise ValueError(f"{path} is a plan of version {values.get('version')}; this version reads {PLAN_VERSION}.")
    if not isinstance(values["base"], dict) or not isinstance(values["base"].get("model"), str):
        raise ValueError(f"{path} does not say which model it is for: it needs `base` with a `model`.")
    edits = []
    for number, edit in enumerate(values["edits"], 1):
        kinds = {"edit": str, "layer": int, "experts": list}
        if not isinstance(edit, dict) or not all(isinstance(edit.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{path}: edit {number} needs its kind, a layer and a list of experts, not {edit}.")
        edits.append(from_json(edit))
    return edits, values["base"]


def plan_after(path: Path, plan: Plan) -> Plan:
    """A later stage's plan, renumbered to follow the plan file of the stage before it: one plan for the first model."""
    earlier, scores = read_plan(path)[0], read_json(path)["scores"]
    edits, shown = {edit.layer: edit for edit in earlier}, dict(plan.scores)
    for edit in earlier:
        if edit.layer in shown and str(edit.layer) in scores:
            by_expert = dict(zip(edit.experts, shown[edit.layer], strict=True))
            shown[edit.layer] = [by_expert.get(e) for e in range(len(scores[str(edit.layer)]))]
    for edit in plan.edits:
        before = edits.get(edit.layer)
        experts = edit.experts if before is None else tuple(before.experts[e] for e in edit.experts)
        edits[edit.layer] = dataclasses.replace(edit, experts=experts)
    return Plan([edits[layer] for layer in sorted(edits)], shown, plan.report)
