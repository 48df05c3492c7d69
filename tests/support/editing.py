"""Checkpoints and models after edits, as compress.py makes them, and what they are compared with."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.surgery import rewrite
from moe_compress.edits.apply import apply_edits, check_edits
from moe_compress.edits.edits import Edit, KeepExperts, to_json
from moe_compress.edits.resulting_config import kept_layers, layer_lists, resulting_config
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from moe_compress.models.shape import moe_shapes
from support import tiny

# Both keep equally many experts in each half, as DeepSeek-V3's two groups need.
SIX, FOUR = (0, 2, 3, 5, 6, 7), (1, 2, 4, 7)
OVERRIDES: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 4},  # two MoE layers
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},  # else no generate
}
IDS = tiny.token_ids()
ALIGNED = 64  # bytes

make = functools.cache(lambda family: tiny.make(family, **OVERRIDES.get(family, {})))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Equal for equal weights, wherever they lie: a product's last bits may depend on where a mapped file has them."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNED:
            parameter.data = parameter.data.clone()
    return model(ids, use_cache=False).logits


@functools.cache
def _loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hf.complete_experts(model)
    return model


def original(source: Checkpoint) -> PreTrainedModel:
    """The model as stock transformers loads it, of one's own."""
    return copy.deepcopy(_loaded(source.folder))


@torch.no_grad()
def cut(source: Checkpoint, edits: Sequence[Edit]) -> PreTrainedModel:
    """The whole model in memory, edited; its config lists the layers that are left."""
    model = original(source)
    apply_edits(model, edits)
    kept = kept_layers([to_json(edit) for edit in edits], hf.num_layers(model.config))
    for name, value in layer_lists(model.config, kept).items():
        derived = getattr(type(model.config), name, None)
        if not isinstance(derived, property) or derived.fset is not None:
            setattr(model.config, name, value)
    return model


def moe_layers(source: Checkpoint) -> list[int]:
    return [shape.layer for shape in moe_shapes(hf.skeleton(source.config, torch.float32))]


def write(source: Checkpoint, edits: Sequence[Edit], out: Path, **keywords: Any) -> Checkpoint:
    """A new checkpoint by surgery, as compress.py makes it."""
    if edits:
        check_edits(hf.skeleton(source.config, source.stored_dtype), edits)
    form = resulting_config(source.values, edits)
    layers = kept_layers([to_json(edit) for edit in edits], source.num_layers)
    writer = CheckpointWriter(out, source, "test", keep_prediction_layers=not edits, layers=layers)
    dense = hf.skeleton(hf.config_from(form.values), source.stored_dtype) if form.dense else None
    rewrite(source, edits, writer, fill=form.fill, dense=dense, **keywords)
    writer.finish(form.values, {})
    return open_checkpoint(out)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, steps: int, never: int | None = None) -> Tensor:
    """Greedy decoding without a cache; token `never` is not chosen."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1:]
        if never is not None:
            logits[..., never] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    return ids


class _Masked(TorchFunctionMode):
    """Inside, a linear map onto the router's width gives -inf for dropped experts."""

    def __init__(self, width: int, dropped: list[int]) -> None:
        super().__init__()
        self.width, self.dropped = width, dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == self.width:
            out[..., self.dropped] = -torch.inf
        return out


@contextlib.contextmanager
def masked(model: PreTrainedModel, edits: Sequence[KeepExperts]) -> Iterator[None]:
    """Dropped experts stay where they are, but can no longer be chosen: logits and selection biases are -inf."""
    views = moe_views(model)
    for edit in edits:
        view = views[edit.layer]
        dropped = sorted(set(range(view.num_experts)) - set(edit.experts))
        view.router.forward = functools.partial(_forward_masked, view.router.forward, view.num_experts, dropped)
        for name, tensor in [*view.block.named_buffers(), *view.block.named_parameters()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.data[..., dropped] = -torch.inf
    yield
    for edit in edits:
        del views[edit.layer].router.forward


def _forward_masked(forward: Callable[..., Any], width: int, dropped: list[int], *args: Any) -> Any:
    with _Masked(width, dropped):
        return forward(*args)
