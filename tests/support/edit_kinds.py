"""Every kind of edit on every family, and who refuses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.edits.edits import (
    DropLayer,
    Edit,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    SetTopK,
    SkipExperts,
    SkipSublayer,
)
from moe_compress.models import hf
from moe_compress.models.hf import edited_architectures
from moe_compress.models.shape import ModelShape, model_shape
from support import tiny
from support.editing import SIX

# Two pairs, one in each half, as DeepSeek-V3's two groups need.
GROUPS = ((0, 1), (2,), (3,), (4, 5), (6,), (7,))
WEIGHTS = ((1.0, 2.0), (1.0,), (1.0,), (1.0, 1.0), (1.0,), (1.0,))
SHIPPED = sorted([*(path.name for path in edited_architectures.SHIPPED), "modeling_moe_compress.py"])
# Architectures whose own keys can say that the first MoE block is gone; all others need an edited checkpoint.
PLAIN_LAYER_DROP = {
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "lfm2_moe", "qwen2_moe", "qwen3_moe",
    "qwen3_next",
}  # fmt: skip
# Of these, the ones that can say so of any layer, not only of the first with experts.
PLAIN_ANYWHERE = {"qwen2_moe", "qwen3_moe", "qwen3_next"}
# Dropped layers cannot be said: slopes depend on a layer's number; a period of layer kinds is broken.
EDITED_BLOCK_DROP = {("minimax", "drop first"), ("minimax", "drop last"), ("jamba", "drop first")}
KINDS = (
    "drop first", "skip moe", "skip attention", "merge centroid", "merge sum", "top_k", "skip experts", "novices",
    "mixed", "uneven",
)  # fmt: skip
MORE_KINDS = ("drop last", "top_k of one", "skip last moe", "keep one layer")
EXPERTS_ONLY = {"merge centroid", "merge sum", "top_k", "skip experts", "novices"}
ALWAYS_PLAIN = {"drop first", "drop last", "merge centroid", "top_k"}
REROUTED = "its block runs the experts itself, so nothing can come between router and experts"
REFUSED = {
    ("llama4_text", "merge sum"): f"router=sum is not possible for llama4_text: {REROUTED}",
    ("llama4_text", "skip experts"): f"skip is not possible for llama4_text: {REROUTED}",
    ("llama4_text", "novices"): f"novice=mean is not possible for llama4_text: {REROUTED}",
    ("phimoe", "top_k"): "the router of phimoe always uses 2 experts.",
    ("phimoe", "top_k of one"): "the router of phimoe always uses 2 experts.",
    ("nemotron_h", "skip moe"): r"layer 0 is nothing but its MoE block: drop the layer \(block_drop\).",
    ("nemotron_h", "skip last moe"): r"layer 2 is nothing but its MoE block: drop the layer \(block_drop\).",
    ("nemotron_h", "skip attention"): r"no attention that could be removed; those that have: \[\]",
    ("qwen3_next", "skip attention"): "layer 1 is the only one left with attention, which has to stay.",
    ("lfm2_moe", "skip attention"): "layer 1 is the only one left with attention, which has to stay.",
}


def merge(layer: int, router: str) -> MergeExperts:
    return MergeExperts(layer, GROUPS, WEIGHTS, router)


def constants(source: Checkpoint, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"outputs": 0.3 * torch.randn(count, source.config.hidden_size, generator=generator)}


def reroutable(source: Checkpoint) -> bool:
    return source.config.model_type != "llama4_text"


@functools.cache
def shape_in(folder: Path) -> ModelShape:
    return model_shape(hf.skeleton(open_checkpoint(folder).config, torch.float32))


def shape_of(source: Checkpoint) -> ModelShape:
    return shape_in(source.folder)


def edits_of(kind: str, source: Checkpoint) -> list[Edit]:
    """The first MoE layer is edited where only one is; `mixed` renumbers layers in its middle."""
    shape = shape_of(source)
    moe = [layer.layer for layer in shape.moe]
    k = 1 if shape.moe[0].top_k > 1 else 2
    kinds: dict[str, Callable[[], list[Edit]]] = {
        "drop first": lambda: [DropLayer(0)],
        "drop last": lambda: [DropLayer(shape.total - 1)],
        "skip moe": lambda: [SkipSublayer(moe[0], "moe")],
        "skip last moe": lambda: [SkipSublayer(moe[-1], "moe")],
        "skip attention": lambda: [SkipSublayer((shape.attention or [0])[0], "attention")],
        "merge centroid": lambda: [merge(layer, "centroid") for layer in moe],
        "merge sum": lambda: [merge(layer, "sum") for layer in moe],
        "keep one layer": lambda: [KeepExperts(moe[0], SIX)],
        "top_k": lambda: [SetTopK(layer, k) for layer in moe],
        "top_k of one": lambda: [SetTopK(moe[0], k)],
        "skip experts": lambda: [SkipExperts(moe[0], 0.9, True)],
        "novices": lambda: [KeepExperts(moe[0], SIX, True, arrays=constants(source, 2))],
        "mixed": lambda: mixed(source),
        "uneven": lambda: uneven(source),
    }
    return kinds[kind]()


def mixed(source: Checkpoint) -> list[Edit]:
    """Before, with and after a layer that goes; later edits count in what is left."""
    shape = shape_of(source)
    last = shape.moe[-1].layer
    summed = reroutable(source) and shape.moe[0].groups == 1
    edits: list[Edit] = [merge(last, "sum" if summed else "centroid"), DropLayer(0)]
    edits.append(KeepExperts(last - 1, (0, 1, 3, 5)))
    if reroutable(source):
        edits.append(SkipExperts(last - 1, 0.5, True))
    attention = [layer - 1 for layer in shape.attention if layer > 0]
    if len(attention) > 1 and source.config.model_type != "jamba":  # its kinds of layers alternate: see below
        return [*edits, SkipSublayer(attention[0], "attention")]
    return [*edits, SetTopK(last - 1, 1)]


def uneven(source: Checkpoint) -> list[Edit]:
    """Experts of different widths, one of them gone, constants in its place where the family can have them."""
    layer = shape_of(source).moe[0].layer
    kept = torch.arange(24, dtype=torch.int32).expand(tiny.EXPERTS, -1)
    narrow = KeepChannels(layer, 24, (8, 24, 16, 8, 24, 16, 8, 24), arrays={"channels": kept})
    if not reroutable(source):
        return [narrow, KeepExperts(layer, SIX)]
    return [narrow, KeepExperts(layer, SIX, True, arrays=constants(source, 2)), SkipExperts(layer, 0.5, True)]


def is_edited(family: str, kind: str) -> bool:
    """Whether such edits need an edited checkpoint."""
    if kind in ("skip moe", "skip last moe"):
        ends = {"ernie4_5_moe"}  # an interval of layers with experts
        return family not in (PLAIN_LAYER_DROP if kind == "skip moe" else PLAIN_ANYWHERE | ends)
    # DeepSeek-V4 keeps all experts in the layers that look them up; its config has one number of them for all layers.
    by_table = family == "deepseek_v4" and kind in EXPERTS_ONLY
    return kind not in ALWAYS_PLAIN or (family, kind) in EDITED_BLOCK_DROP or by_table
