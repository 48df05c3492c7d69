"""What can be known to fail of a stage that recovers before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.registry import QUANTIZATION, format_in
from moe_compress.checkpoints.quantization_config import packed_edits
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.compression.recovery.adapters import adapted_parameters, require_smaller
from moe_compress.compression.recovery.lineage import edits_from, lineage
from moe_compress.compression.recovery.trained_codes import CODES, SCALES, TRAINABLE
from moe_compress.compression.recovery.trained_weights import PARTS, trained_parameters
from moe_compress.methods import registry
from moe_compress.methods.recovery_method import (
    LAYERED,
    Distillation,
    LayerDistillation,
    Rebalancing,
    Recovery,
    RouterFit,
)
from moe_compress.methods.stage_options import TEACHER, TrainingOptions
from moe_compress.models import hf
from moe_compress.models.component_map import EXPERTS, component_of_modules
from moe_compress.models.modeling.packed_linear import PackedMatrix, is_packed
from moe_compress.models.modeling.rerouting import rerouting_of
from moe_compress.models.moe import all_moe_views, moe_views
from moe_compress.models.router_rule import selection_bias
from moe_compress.models.sublayers import within
from moe_compress.recipes.recipe import Recipe, Stage
from moe_compress.run.context import Run

# Beyond it a step of AdamW is no float32 any more.
LARGEST_RATE = 1e30
# What is needed of training options that may be 0, too.
LIMITS = {
    **dict.fromkeys(("decay", "clip", "checkpoint_every", "keep_checkpoints"), "a number from 0 up"),
    "warmup": "a share from 0 to 1",
    "holdout": "a share from 0 to less than 1",
}


def check_recovery(stage: Stage, model: PreTrainedModel, values: Mapping[str, Any], *, first: bool) -> None:
    """Raise ValueError for words that mean nothing, a student that is its own teacher, or packed weights to be trained.

    model: a skeleton of the student; values: config.json's, which say what else of it is packed.
    """
    if first and not stage.parameters[TEACHER]:
        raise ValueError(
            f"{stage.method} has nothing to recover: put it behind a stage that compresses, or name the model to learn "
            "from (teacher=)."
        )
    _require_sense(stage)
    task = task_of(stage)
    if isinstance(task, Rebalancing):
        _require_biases(model)
    if isinstance(task, RouterFit) and not moe_views(model):
        raise ValueError(f"{model.config.model_type} as it is here has no router that could be fitted.")
    if not isinstance(task, Distillation | LayerDistillation):
        return
    _require_trainable(stage, task, model, values)
    vocabulary = model.config.get_text_config().vocab_size
    if isinstance(task, Distillation) and task.keeping is not None and stage.parameters["top"] >= vocabulary:
        raise ValueError(
            f"top={stage.parameters['top']}: fewer tokens than the vocabulary has ({vocabulary}) are needed."
        )
    if isinstance(task, Distillation) and "router" in task.terms and not all_moe_views(model):
        raise ValueError("loss=router: no layer that is left has a router.")
    if isinstance(task, Distillation) and "experts" in task.terms:
        _require_pairs(model)


def _require_trainable(
    stage: Stage, task: Distillation | LayerDistillation, model: PreTrainedModel, values: Mapping[str, Any]
) -> None:
    """Raise ValueError for parts that are not there, or not in plain numbers."""
    packed, coded = _packed_words(model, values), task.trains & {CODES, SCALES}
    if coded and (not packed or isinstance(task, LayerDistillation)):
        why = "layerwise trains plain numbers alone" if packed else "nothing is packed there"
        raise ValueError(f"train={','.join(sorted(task.trains))}: {why}: put {stage.method} behind `quantize`.")
    if coded and not _holds_codes(model, values):
        raise ValueError(
            f"train={','.join(sorted(task.trains))}: what {format_in(values).name} packs has more than whole codes and "
            f"scales (zero points), or codes of floating point: put {stage.method} behind `quantize` with "
            f"{TRAINABLE}."
        )
    for word in packed:
        if task.adapters is not None and word in task.adapters.parts:
            raise ValueError(
                f"train={stage.parameters['train']}: {word} are packed there, and what adapters add would make them "
                "dense: train scales (qad) or routers (train=routers), or put this stage before the one that quantizes."
            )
        if word in task.trains or "all" in task.trains:
            raise ValueError(
                f"train={','.join(sorted(task.trains))}: {word} are packed there, and codes cannot be trained: train "
                "what is plain, such as routers, or put this stage before the one that quantizes."
            )
    found = trained_parameters(model, task.trains - coded) if task.trains - coded else {}
    if task.adapters is not None:
        require_smaller(model, task.adapters)
        found |= adapted_parameters(model, task.adapters.parts)
    if isinstance(task, LayerDistillation) and not any(name.startswith(hf.layers_prefix(model)) for name in found):
        raise ValueError(f"train={','.join(sorted(task.trains))}: none of that lies in a layer.")


def _require_pairs(model: PreTrainedModel) -> None:
    """Raise ValueError where experts of the student cannot be held beside the teacher's."""
    views = all_moe_views(model)
    if not views:
        raise ValueError("loss=experts: no layer that is left has experts: use loss=hidden.")
    skipping = [index for index, view in views.items() if rerouting_of(view.experts)["threshold"] is not None]
    if skipping:
        raise ValueError(
            f"loss=experts: tokens skip experts by their gates (layers {skipping[:5]}), so that which ones are "
            "compared would change as they learn: put this stage before the one that skips, or use loss=hidden."
        )


def task_of(stage: Stage) -> Recovery:
    """What a stage asks for."""
    task: Recovery = registry.find(stage.method).run(**stage.own_parameters)
    return task


def require_shareable(recipe: Recipe, run: Run) -> None:
    """Raise ValueError for trainings that cannot share out layers, where a launch asks for that."""
    if run.processes.mesh is None:
        return
    for stage in recipe.stages:
        task = task_of(stage) if trains_end_to_end(stage) else None
        if not isinstance(task, Distillation):
            continue
        words = {"train=lora": task.adapters is not None, "loss=experts": "experts" in task.terms}
        found = next((word for word, asked in words.items() if asked), None)
        if found is not None:
            raise ValueError(
                f"{stage.method} {found} works on whole layers, which this launch would share out (FSDP): launch it "
                "without, as scripts/recover/accelerate/ddp.yaml does."
            )


def trains_end_to_end(stage: Stage) -> bool:
    """Whether it trains a whole model, which may be followed."""
    return registry.find(stage.method).scope == "recovery" and isinstance(task_of(stage), Distillation)


def compares_layers(task: Recovery) -> bool:
    """Whether layers or routers of the student are held beside the teacher's."""
    return not isinstance(task, Distillation) or bool(set(LAYERED) & task.terms.keys())


def check_teachers(recipe: Recipe, source: Checkpoint, run: Run) -> None:
    """Raise ValueError for a teacher that the model cannot learn from, by its config, plan and tokenizer."""
    for number, stage in enumerate(recipe.stages):
        name = stage.parameters.get(TEACHER)
        if not name:
            continue
        teacher = resolve_model(name)
        if number == 0 and teacher.fingerprint == source.fingerprint:
            raise ValueError(itself(source))
        require_same_tokens(source, teacher, run)
        if compares_layers(task_of(stage)):
            led = edits_from(teacher, source)
            lineage(source.skeleton(torch.float32), teacher.skeleton(torch.float32), led)


def itself(student: Checkpoint) -> str:
    """What is said of a student that would be its own teacher."""
    return (
        f"{student.name} would learn from itself: put this stage behind one that compresses, or name another model to "
        "learn from (teacher=)."
    )


def require_same_tokens(student: Checkpoint, teacher: Checkpoint, run: Run) -> None:
    """Raise ValueError for a teacher to which the same numbers are other tokens, or none."""
    theirs, ours = (each.text_config.vocab_size for each in (teacher, student))
    if theirs != ours:
        raise ValueError(f"teacher={teacher.name} has a vocabulary of {theirs}, the model one of {ours}.")
    if not (teacher.folder / "tokenizer_config.json").is_file():
        return
    known, here = (run.tokenizer(each).get_vocab() for each in (teacher, student))
    strange = next((token for token, number in here.items() if known.get(token, number) != number), None)
    if strange is not None:
        raise ValueError(
            f"teacher={teacher.name} has other tokens than the model: {strange!r} is another number to it."
        )


def _require_biases(model: PreTrainedModel) -> None:
    views = moe_views(model)
    lacking = [index for index, view in views.items() if selection_bias(view) is None]
    if lacking or not views:
        raise ValueError(
            f"{model.config.model_type} as it is here has no selection bias to be moved (layers {lacking[:5]}): "
            "rebalance is for routers like DeepSeek-V3's."
        )


def _packed_words(model: PreTrainedModel, values: Mapping[str, Any]) -> list[str]:
    """Words of train= some of whose matrices are packed, in modules of the skeleton or as config.json says."""
    places, views, prefix = component_of_modules(model), all_moe_views(model), hf.layers_prefix(model)
    components = {places[name] for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    for edit in packed_edits(model, values) if values.get(QUANTIZATION) else ():
        view = views.get(edit.layer)
        for name in edit.bits:
            inside = view is not None and within(name, view.names["experts"])
            components.add(EXPERTS if inside else places.get(f"{prefix}{edit.layer}.{name}", ""))
    return [word for word, meant in PARTS.items() if components & set(meant)]


def _holds_codes(model: PreTrainedModel, values: Mapping[str, Any]) -> bool:
    """Whether any matrix is held in whole codes with scales, as modules of the skeleton or config.json say."""
    config = values.get(QUANTIZATION)
    return is_packed(model) or bool(config and format_in(values).whole_codes(config))


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
        "holdout": not 0.0 <= options.holdout < 1.0,
        "decay": not 0.0 <= options.decay < float("inf"),
        "clip": not 0.0 <= options.clip < float("inf"),
    }
    if LARGEST_RATE < options.lr < float("inf"):
        raise ValueError(f"{stage.method}.lr={options.lr:g}: a number up to {LARGEST_RATE:g} is needed.")
    for name, bad in wrong.items():
        if bad:
            limit = LIMITS.get(name, "a number above 0")
            raise ValueError(f"{stage.method}.{name}={getattr(options, name)}: {limit} is needed.")
