"""A recipe tried on a skeleton: every stage's checks and the edits it would make, no weight read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import PreTrainedModel

from moe_compress.checkpoints.partly_packed import after_edits
from moe_compress.compression.recovery.checks import check_recovery
from moe_compress.compression.weights.checks import check_weights, gram_bytes, output_gram_bytes, require_rescalable
from moe_compress.compression.weights.format_choice import Storage, pack_skeleton, storage_for
from moe_compress.compression.weights.stage_matrices import StageMatrices, factoring_of
from moe_compress.edits.apply import check_edits, refuse_if_uneditable
from moe_compress.edits.edits import Edit, FactorExperts, MakeDense
from moe_compress.edits.factors import Form, Part
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.methods import registry
from moe_compress.methods.stage_options import WORDS_OF_TEXT
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from moe_compress.models.shape import model_shape
from moe_compress.recipes.recipe import Recipe, Stage


@dataclass
class DryRun:
    """What a recipe would do.

    values: config.json's, up to date in what is packed; model: a skeleton of what is left, in plain numbers; edits: all
    that lead from the values to it, with arbitrary experts in the right numbers;
    gram_bytes: the largest Gram matrices it holds; output_bytes: of the loss's gradients, while these come back;
    keeps_beside: whether modules that are stored beside the model's layers can stay.
    """

    values: dict[str, Any]
    model: PreTrainedModel
    edits: list[Edit] = field(default_factory=list)
    gram_bytes: int = 0
    output_bytes: int = 0
    keeps_beside: bool = True


def dry_run(recipe: Recipe, model: PreTrainedModel, values: Mapping[str, Any]) -> DryRun:
    """Carry the recipe out on a skeleton, which is used up.

    values: config.json's, which say what of it is packed in a plain format. Raises ValueError for whatever can be known
    to fail before a weight is read.
    """
    found, pattern = DryRun(dict(values), model), ""
    for number, stage in enumerate(recipe.stages, 1):
        try:
            if pattern and registry.find(stage.method).breaks_patterns:
                raise ValueError(f"it would not leave {pattern} as it is: put it before the stage that prunes to it.")
            _require_text(stage)
            if registry.find(stage.method).scope == "weight":
                _dry_weights(stage, found.model, found)
            elif registry.find(stage.method).scope == "recovery":
                check_recovery(stage, found.model, found.values, first=number == 1)
            else:
                found.edits += _dry_stage(stage, found.model, found)
            found.keeps_beside &= not found.edits
            _go_on_dense(found)
            pattern = stage.parameters.get(registry.find(stage.method).leaves_pattern) or pattern
        except ValueError as error:
            if len(recipe.stages) == 1:
                raise
            raise ValueError(f"stage {number} ({stage.method}): {error}") from error
    return found


def _go_on_dense(found: DryRun) -> None:
    """Let later stages see the architecture without experts that the edits so far lead to, if they do."""
    if any(isinstance(edit, MakeDense) for edit in found.edits):
        found.values, found.edits = resulting_config(found.values, found.edits).values, []
        found.model = hf.skeleton(hf.config_from(found.values), found.model.dtype)


def _require_text(stage: Stage) -> None:
    """Raise ValueError for words about the text of a stage that looks at none."""
    said = [f"{key}={stage.parameters[key]}" for key in WORDS_OF_TEXT if key in stage.explicit_parameters]
    if said and stage.needs not in registry.FROM_TEXT:
        raise ValueError(
            f"{' '.join(said)} would do nothing: with its other words {stage.method} looks at no text; leave it out."
        )


def _dry_weights(stage: Stage, model: PreTrainedModel, found: DryRun) -> None:
    """The same for one stage that changes weights."""
    refuse_if_uneditable(model.config)
    matrices = StageMatrices(stage, model)
    check_weights(stage, matrices)
    if registry.find(stage.method).implementation.factoring is not None:
        _dry_factors(stage, matrices, found)
        return
    storage = storage_for(matrices, found.values)
    if stage.needs == "input_grams":
        needed = (each * experts for each, experts in gram_bytes(matrices).values())
        found.gram_bytes = max(found.gram_bytes, *needed)
    before, found.values = found.values, storage.values(found.values)
    require_rescalable(stage, model, found.values)
    found.edits += pack_skeleton(storage)
    found.keeps_beside &= storage.keeps_beside(before, found.values)


def _dry_factors(stage: Stage, matrices: StageMatrices, found: DryRun) -> None:
    """The same for one that leaves factors: about as large as its words say, where they are shared out."""
    factoring, own = factoring_of(stage), stage.own_parameters
    if stage.needs == "input_grams" and not factoring.pools(own):
        needed = gram_bytes(matrices, crosses=factoring.crosses(own), tables=0).values()
        found.gram_bytes = max(found.gram_bytes, *(each * count for each, count in needed))
    if factoring.outputs(own):
        pools = factoring.pools(own)
        found.output_bytes = max(found.output_bytes, *output_gram_bytes(matrices, pools).values())
    found.values = Storage(matrices).values(found.values)
    planned: list[Edit] = []
    for index, view in moe_views(matrices.model).items():
        linears = {
            matrix.name: factoring.linear_rank(*matrix.weight_BOI.shape[1:], **own)
            for matrix in matrices.by_layer[index]
            if matrix.kind == "shared"
        }
        forms: dict[Part, Form] = {}
        if "experts" in matrices.kinds:
            shapes = {part: tuple(view.stacks()[part].shape) for part in get_args(Part) if part in view.stacks()}
            forms = factoring.forms(shapes, matrices.model.dtype.itemsize, **own)
        if forms or linears:
            planned.append(FactorExperts(index, forms, linears))
    check_edits(matrices.model, planned)
    found.edits += planned
    found.keeps_beside = False


def _dry_stage(stage: Stage, model: PreTrainedModel, found: DryRun) -> Sequence[Edit]:
    """The same for one stage that changes the structure."""
    method = registry.find(stage.method)
    if method.check is None:
        return []
    refuse_if_uneditable(model.config)
    shape = model_shape(model)
    rerouted = [moe.layer for moe in shape.moe if moe.rerouted]
    if rerouted and stage.needs == "outputs":
        raise ValueError(
            f"{stage.method} has to know what every expert does alone, but layers {rerouted[:5]} were merged with "
            "router=sum, hold constants or skip experts: put this stage before that one."
        )
    planned: list[Edit] = method.check(shape, **stage.parameters).edits
    found.values = after_edits(found.values, model, planned)
    check_edits(model, planned)
    return planned
