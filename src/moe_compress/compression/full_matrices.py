"""The ordinary architecture of a model in factors: every matrix multiplied out, for programs that know no factors.

What it computes stays the same within the rounding of its numbers, and nothing that factors save is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.folder import require_free
from moe_compress.checkpoints.lock import exclusive_output
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.export import exported_manifest
from moe_compress.edits.resulting_config import ResultingConfig, kept_layers, layer_lists, plain_form, split_values
from moe_compress.engine.forward import Progress
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.factored_experts import FactoredLinear
from moe_compress.models.modeling.unfused_experts import CHILDREN, biases
from moe_compress.models.moe import MoEView, moe_view, moe_views
from moe_compress.models.sublayers import block_names
from moe_compress.utils.files import gigabytes, require_disk
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

FACTORED = "factor_experts"


def in_factors(checkpoint: Checkpoint) -> bool:
    """Whether any experts of an edited checkpoint are held in factors."""
    return any(edit["edit"] == FACTORED for edit in split_values(checkpoint.values)[1])


def write_full_matrices(checkpoint: Checkpoint, out: Path, progress: Progress | None = None) -> Path:
    """Write the plain checkpoint of a model in factors, one layer at a time.

    Raises ValueError where its other edits leave what no plain model is; then nothing is left behind.
    """
    form, plain = _plain(checkpoint)
    size = sum(tensor.numel() for tensor in plain.state_dict().values()) * checkpoint.dense_dtype.itemsize
    require_free(out)
    require_disk(out.parent, size, "the plain checkpoint")
    identity = fingerprint("full matrices", checkpoint.fingerprint)
    with exclusive_output(out, [identity]):
        writer = CheckpointWriter(out, checkpoint, identity, keep_prediction_layers=False)
        _write_layers(checkpoint, plain, writer, progress)
        manifest = exported_manifest(checkpoint, "full_matrices_from")
        writer.finish(form.values, {**manifest, "identity": identity, "form": "plain"})
    log.warning(
        "%s: full matrices save no memory: %s, and %s in factors.",
        out.name, gigabytes(size), gigabytes(checkpoint.bytes),
    )  # fmt: skip
    return out


def _plain(checkpoint: Checkpoint) -> tuple[ResultingConfig, PreTrainedModel]:
    """Config values without the factors, and their skeleton."""
    base, edits = split_values(checkpoint.values)
    if any(edit["edit"] == "pack_matrices" for edit in edits):
        raise ValueError(f"{checkpoint.name} holds packed factors: export what it was before quantize.")
    others = [edit for edit in edits if edit["edit"] != FACTORED]
    config = hf.config_from(base)
    model = hf.skeleton(config, torch.bfloat16)
    edited_model.replay(model, {"moe": block_names(model), "edits": others})
    form = plain_form(base, config, model, layer_lists(config, kept_layers(edits, hf.num_layers(config))))
    if form is None or form.fill:
        raise ValueError(
            f"{checkpoint.name} differs from a plain model in more than its factors: what its layers have lost besides "
            "has to be the same in all of them."
        )
    return form, hf.skeleton(hf.config_from(form.values), checkpoint.stored_dtype)


def _write_layers(
    checkpoint: Checkpoint, plain: PreTrainedModel, writer: CheckpointWriter, progress: Progress | None
) -> None:
    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
    hf.remember_names(plain, checkpoint.tensors)
    family = family_of(checkpoint.config)
    writer.copy(None)
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            view = moe_view(layer, family)
            _join_linears(layer)
            if view is None or not view.factored:
                prefix = f"{hf.layers_prefix(plain)}{index}."
                state = {prefix + key: tensor for key, tensor in layer.state_dict().items()}
            else:
                state = _full_state(plain, index, layer, view)
            writer.write(index, hf.checkpoint_tensors(plain, state))
        if progress is not None:
            progress(index + 1, checkpoint.num_layers)


@torch.no_grad()
def _join_linears(layer: nn.Module) -> None:
    """One map again in the place of each that is held as two."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, FactoredLinear):
            joined = nn.Linear(1, 1, bias=False, device="meta")
            joined.weight, joined.bias = nn.Parameter(module.dense(), requires_grad=False), module.left.bias
            layer.set_submodule(name, joined)


@torch.no_grad()
def _full_state(plain: PreTrainedModel, index: int, layer: nn.Module, view: MoEView) -> dict[str, Tensor]:
    """The layer's tensors by module name, whole matrices in the place of factors."""
    name, prefix = view.names["experts"], f"{hf.layers_prefix(plain)}{index}."
    whole = moe_views(plain)[index]
    fused: Any = whole.experts
    for key, parameter in fused._parameters.items():
        if parameter is not None:
            held = view.experts._parameters.get(key)
            fused._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="cpu") if held is None else held)
    _fill(whole, view)
    inside = tuple(f"{name}.{child}." for child in ("separate", "shared_parts"))
    state = {prefix + key: tensor for key, tensor in layer.state_dict().items() if not key.startswith(inside)}
    state |= {f"{prefix}{name}.{key}": tensor for key, tensor in fused.state_dict().items()}
    fused.to("meta")
    return state


def _fill(whole: MoEView, view: MoEView) -> None:
    """Matrices and biases of experts that are held one by one, into the tensors of all of them."""
    offsets = biases(whole.experts)
    for part, stack_EOI in whole.stacks().items():
        for number, expert in enumerate(view.experts.separate):
            matrix = expert[CHILDREN[part]]
            stack_EOI[number].copy_(matrix.dense())
            if part in offsets:
                offsets[part][number].copy_(matrix.bias)
