"""Making an uneven model plain: layers with fewer experts get dead ones, which no token can choose.

Exact only where the router adds a bias before it selects: there a dead expert's bias is far below every score. A
router without one would give a dead expert the logit 0, which beats every negative logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.checkpoints.folder import read_manifest, require_free
from moe_compress.checkpoints.lock import exclusive_output
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.edits.resulting_config import kept_layers, layer_lists, plain_form, split_values
from moe_compress.engine.forward import Progress
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.families import family_of, groups_of
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.edit_layer import COUNTS
from moe_compress.models.moe import MoEView, moe_view, moe_views
from moe_compress.models.router_rule import routing_tensors
from moe_compress.models.sublayers import block_names
from moe_compress.utils.files import require_disk
from moe_compress.utils.hashing import fingerprint

# Far below every score or logit, and finite: readers take infinity for a broken checkpoint.
DEAD = -1e4
TOKENS = 64
TOLERANCE = 1e-5


def pad_experts(checkpoint: Checkpoint, out: Path, progress: Progress | None = None) -> Path:
    """Write the plain equivalent of an edited checkpoint whose layers keep different numbers of experts.

    Raises ValueError, with the reason, where there is none; then nothing is left behind.
    """
    values = _padded_values(checkpoint)
    require_free(out)
    require_disk(out.parent, 2 * checkpoint.bytes, "the padded checkpoint")
    identity = fingerprint("pad", checkpoint.fingerprint)
    with exclusive_output(out, [identity]):
        writer = CheckpointWriter(out, checkpoint, identity, keep_prediction_layers=False)
        count = _write_layers(checkpoint, writer, progress)
        manifest = exported_manifest(checkpoint, "padded_from")
        writer.finish(values, {**manifest, "identity": identity, "form": "plain", "padded_to": count})
    return out


def exported_manifest(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """What the edited checkpoint says of itself, and under `key` which one it was."""
    source = {"model": checkpoint.name, "commit": checkpoint.commit}
    blank = {
        "base": {**source, "fingerprint": checkpoint.fingerprint},
        "stages": [],
        "report": [],
        "cost": {"surgery_seconds": 0.0, "peak_bytes": 0},
    }
    return {**(read_manifest(checkpoint.folder) or blank), key: source}


def _write_layers(checkpoint: Checkpoint, writer: CheckpointWriter, progress: Progress | None) -> int:
    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
    family, count = family_of(checkpoint.config), _most(layers.model)
    writer.copy(None)
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            view = moe_view(layer, family)
            if view is None or view.num_experts == count:
                writer.copy(index)
            else:
                _pad_checked(view, count, index)
                state = hf.layer_state(layers.model, index)
                writer.write(index, hf.checkpoint_tensors(layers.model, state))
        if progress is not None:
            progress(index + 1, checkpoint.num_layers)
    return count


def _most(model: Any) -> int:
    return max(view.num_experts for view in moe_views(model).values())


def _padded_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the padded model, tried on a skeleton."""
    base, edits = split_values(checkpoint.values)
    if not edits:
        raise ValueError(f"{checkpoint.name} is plain already: stock tools load it as it is.")
    config = hf.config_from(base)
    if groups_of(config)[0] > 1:
        raise ValueError(f"{config.model_type} routes within groups, which dead experts would take part in.")
    model = hf.skeleton(config, torch.bfloat16)
    edited_model.replay(model, {"moe": block_names(model), "edits": edits})
    count = _most(model)
    for view in moe_views(model).values():
        if view.spare_rows:
            raise ValueError(
                f"the router of {config.model_type} has rows behind those of its experts: none can be added."
            )
        if view.router_rows != view.num_experts:
            raise ValueError(f"{checkpoint.name} reroutes tokens behind its router, which no plain model does.")
        _pad(view, count)
    form = plain_form(base, config, model, layer_lists(config, kept_layers(edits, hf.num_layers(config))))
    if form is None or form.fill:
        raise ValueError(f"{checkpoint.name} differs from a plain model in more than its numbers of experts.")
    return form.values


def _pad_checked(view: MoEView, count: int, index: int) -> None:
    """Pad one block and see that it still computes the same."""
    generator = torch.Generator().manual_seed(index)
    width = view.router_rows_ED.shape[1]
    x_TD = torch.randn(1, TOKENS, width, generator=generator).to(view.experts.down_proj.dtype)
    before_TD = _first(view.block(x_TD))
    _pad(view, count)
    after_TD = _first(view.block(x_TD))
    if not torch.allclose(before_TD.float(), after_TD.float(), atol=TOLERANCE, rtol=TOLERANCE):
        raise ValueError(f"layer {index} would not compute the same with dead experts: keep the edited checkpoint.")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _pad(view: MoEView, count: int) -> None:
    """Dead experts up to `count`: zero weights and router rows, and a bias that is never chosen."""
    before = view.num_experts
    bias_E = _bias(view)
    if before == count:
        return
    for module in (view.block, view.experts, *view.router.modules()):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or (module is view.block and tensor.dim() != 1):
                    continue
                dim = next((d for d in (0, 1) if d < tensor.dim() and tensor.shape[d] == before), None)
                if dim is not None and (dim == 0 or module is not view.experts):
                    longer = _longer(tensor, dim, count, DEAD if tensor is bias_E else 0.0)
                    table[name] = nn.Parameter(longer, requires_grad=False) if table is module._parameters else longer
        for attribute in COUNTS:
            if module.__dict__.get(attribute) == before:
                setattr(module, attribute, count)


def _longer(tensor: Tensor, dim: int, count: int, value: float) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = count - shape[dim]
    return torch.cat([tensor.detach(), tensor.new_full(shape, value)], dim)


def _bias(view: MoEView) -> Tensor:
    """What the router adds before it selects: a selection bias, or the bias of its logits."""
    named = [t for name, t in routing_tensors(view) if "bias" in name]
    found = [t for t in named if t.numel() == t.shape[-1] == view.num_experts]
    if len(found) != 1:
        raise ValueError(
            f"the router of {type(view.block).__name__} has no selection bias: a dead expert would have the logit 0 "
            "and be chosen before every expert with a negative one. Serve the edited checkpoint."
        )
    return found[0]
