"""A training end to end as every process puts it together, and what it leaves, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.recovery.adapters import require_trained_plain, trained_of
from moe_compress.compression.recovery.arithmetic import arithmetic_of, load_dtype, training_dtype
from moe_compress.compression.recovery.checks import compares_layers
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.lineage import Lineage, lineage
from moe_compress.compression.recovery.shared_out import whole
from moe_compress.compression.recovery.teachers import Teaching
from moe_compress.compression.recovery.trained_codes import TrainedMatrix, packed_again, pruned_kinds
from moe_compress.compression.recovery.trained_weights import PARTS, stored_tensors
from moe_compress.compression.recovery.whole_model import WholeModel
from moe_compress.data.windows import Windows
from moe_compress.edits.edits import Edit
from moe_compress.methods.recovery_method import Distillation
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.models import hf
from moe_compress.models.component_map import component_of_modules
from moe_compress.run.context import Run
from moe_compress.run.processes import connected


def training_of(
    task: Distillation,
    options: TrainingOptions,
    source: Checkpoint,
    teaching: Teaching,
    edits: Sequence[Edit],
    windows: Windows,
    run: Run,
) -> DistillationRun:
    """A student in memory, ready to be trained. edits: those between it and its teacher."""
    dtype = dtype_of(run)
    student = WholeModel(source, run, load_dtype(source.stored_dtype, dtype), recompute=options.recompute)
    trained = trained_of(student.model, task, run.options.seed)
    require_trained_plain(source, task, trained)
    hold_zeros(student.model, pruned_kinds(source.folder))
    student.arithmetic = arithmetic_of(student.model, trained, run.device, dtype)
    layered = teaching.online if compares_layers(task) else None
    kin = Lineage([], [], {}) if layered is None else lineage(student.model, layered.model, edits)
    taught_by = teaching.online or teaching.cache
    return DistillationRun(task, options, student, taught_by, windows, trained, kin, run.options.seed, run.processes)


def hold_zeros(model: PreTrainedModel, kinds: frozenset[str]) -> None:
    """Let codes that are zero stay so in these parts of a layer, whatever their pattern."""
    held, places = {each for kind in kinds for each in PARTS.get(kind, ())}, component_of_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, TrainedMatrix) and places[name] in held:
            module.pruned = True


def dtype_of(run: Run) -> torch.dtype:
    """In which a run multiplies while it trains: where layers are shared out, as they are held."""
    return torch.float32 if run.processes.mesh is not None else training_dtype(run.dtype)


@connected()
def changed_by_layer(
    source: Checkpoint, training: DistillationRun
) -> dict[int | None, dict[str, Tensor | StoredWeight]]:
    """Trained parameters by layer (None: outside of them), under the checkpoint's names; what is tied under each.

    Where layers are shared out among processes, all have to ask for it, and the first is given it.
    """
    model, named = training.student.model, training.trained.weights()
    coded = {name for name, each in model.named_modules() if isinstance(each, TrainedMatrix)}
    inside = {
        name: whole(each.detach())
        for name, each in named.items()
        if name.startswith(hf.layers_prefix(model)) and name.rpartition(".")[0] not in coded
    }
    found: dict[int | None, dict[str, Tensor | StoredWeight]] = defaultdict(dict)
    for key, tensor in {**stored_tensors(model, inside), **(packed_again(source, model) if coded else {})}.items():
        found[hf.layer_of(key)][key] = tensor
    changed, outside = {id(each) for each in named.values()}, hf.names_outside(model, source.keys(None))
    for name, each in model.named_parameters(remove_duplicate=False):
        if id(each) in changed and name in outside:
            found[None][outside[name]] = each.detach()
    return found
