"""What can be known to fail of a stage that recovers before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from moe_compress.checkpoints.partly_packed import packed_kinds
from moe_compress.compression.recovery.trained_codes import CODES, SCALES
from moe_compress.compression.recovery.trained_weights import trained_parameters
from moe_compress.edits.edits import Edit, PackMatrices
from moe_compress.methods import registry
from moe_compress.methods.recovery_method import Distillation, LayerDistillation
from moe_compress.methods.stage_options import TEACHER, TrainingOptions
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import Kind, layer_matrices
from moe_compress.recipes.recipe import Stage

# What words of train= call the kinds of matrices that may be packed.
KINDS: dict[str, Kind] = {
    "routers": "router", "experts": "experts", "shared": "shared", "attention": "attention", "dense": "dense",
}  # fmt: skip


def check_recovery(
    stage: Stage, model: PreTrainedModel, values: Mapping[str, Any], edits: Sequence[Edit], *, first: bool
) -> None:
    """Raise ValueError for words that mean nothing, a student that is its own teacher, or packed weights to be trained.

    model: a skeleton of the student in plain numbers; values, edits: what says that some of it is packed.
    """
    if first and not stage.parameters[TEACHER]:
        raise ValueError(
            f"{stage.method} has nothing to recover: put it behind a stage that compresses, or name the model to learn "
            "from (teacher=)."
        )
    _require_sense(stage)
    task = registry.find(stage.method).run(**stage.own_parameters)
    if not isinstance(task, Distillation | LayerDistillation):
        return
    packed, coded = packed_kinds(model, values) | _packed_by(edits, model), task.trains & {CODES, SCALES}
    if coded and (not packed or isinstance(task, LayerDistillation)):
        why = "layerwise trains plain numbers alone" if packed else "nothing is packed there"
        raise ValueError(f"train={','.join(sorted(task.trains))}: {why}: put {stage.method} behind `quantize`.")
    if task.trains - coded:
        trained_parameters(model, task.trains - coded)
    vocabulary = model.config.get_text_config().vocab_size
    if isinstance(task, Distillation) and task.keeping is not None and stage.parameters["top"] >= vocabulary:
        raise ValueError(
            f"top={stage.parameters['top']}: fewer tokens than the vocabulary has ({vocabulary}) are needed."
        )
    for word, kind in KINDS.items():
        if kind in packed and (word in task.trains or "all" in task.trains):
            raise ValueError(
                f"train={','.join(sorted(task.trains))}: {word} are packed there, and codes cannot be trained: train "
                "what is plain, such as routers, or put this stage before the one that quantizes."
            )


def _packed_by(edits: Sequence[Edit], model: PreTrainedModel) -> set[Kind]:
    """Kinds of matrices that stages before pack into modules."""
    layers, family = hf.decoder_layers(model), family_of(model.config)
    return {
        matrix.kind
        for edit in edits
        if isinstance(edit, PackMatrices) and edit.layer < len(layers)
        for matrix in layer_matrices(layers[edit.layer], family)
        if matrix.name in edit.bits
    }


def _require_sense(stage: Stage) -> None:
    """Raise ValueError for training options of which no step could be taken."""
    options = TrainingOptions.of(stage.parameters)
    wrong = {
        "steps": options.steps < 1,
        "batch": options.batch < 1,
        "keep": options.keep < 1,
        "checkpoint_every": options.checkpoint_every < 0,
        "keep_checkpoints": options.keep_checkpoints < 0,
        "lr": not 0.0 < options.lr < float("inf"),
        "warmup": not 0.0 <= options.warmup <= 1.0,
        "decay": not 0.0 <= options.decay < float("inf"),
        "clip": not 0.0 <= options.clip < float("inf"),
    }
    for name, bad in wrong.items():
        if bad:
            limit = "a share from 0 to 1" if name == "warmup" else "a number above 0"
            raise ValueError(f"{stage.method}.{name}={getattr(options, name)}: {limit} is needed.")
