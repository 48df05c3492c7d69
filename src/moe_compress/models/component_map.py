"""Which component of a model each of its modules belongs to, and which of them mix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import DENSE
from moe_compress.models.moe import ROUTER_WORDS, MoEView, moe_view
from moe_compress.models.sublayers import BESIDE, KINDS, LINEAR_MIXERS

EMBEDDING, HEAD, NORMS = "embedding", "head", "norms and other"
PROJECTIONS, SCORES = "attention projections", "attention scores and values"
RECURRENT, SCANS = "recurrent projections", "recurrent scans and convolutions"
ROUTERS, EXPERTS, SHARED, MLPS = "routers", "routed experts", "shared experts", "dense MLPs"
COMPONENTS = (EMBEDDING, PROJECTIONS, SCORES, RECURRENT, SCANS, ROUTERS, EXPERTS, SHARED, MLPS, NORMS, HEAD)
ATTENTION_CHILDREN = ("self_attn", "self_attention", "attention", "attn")
# What a recurrent mixer calls the sides of its state, and what a step costs for each of its elements: it decays (1), is
# added to (2) and read (2); the delta rule reads it twice, and Mamba's first version makes a decay for each (2 more).
STATES = (
    (("num_v_heads", "head_k_dim", "head_v_dim"), 7),
    (("num_heads", "head_dim", "ssm_state_size"), 5),
    (("intermediate_size", "ssm_state_size"), 7),
    (("num_attention_heads", "head_dim", "head_dim"), 5),
)
# Linear maps that run inside the scan, and the one by which latent attention expands what it has cached.
STEP_SIZE, EXPANDING = "dt_proj", "kv_b_proj"


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """One attention: FLOPs of a token with one other, tokens that it sees (None: all), the map that expands its cache.

    expansion: multiply-adds for each token in the cache; 0 where keys and values are cached.
    """

    pair: int
    window: int | None
    expansion: int


def component_of_modules(model: PreTrainedModel) -> dict[str, str]:
    """The component of every module, by its name in the model."""
    ends = {id(model.get_input_embeddings()): EMBEDDING, id(model.get_output_embeddings()): HEAD}
    found = {name: ends.get(id(module), NORMS) for name, module in model.named_modules()}
    family, prefix = family_of(model.config), hf.layers_prefix(model)
    for index, layer in enumerate(hf.decoder_layers(model)):
        view = moe_view(layer, family)
        recurrent = [path for path, mixer in _mixers(layer) if _is_recurrent(layer, mixer)]
        for name, module in layer.named_modules():
            if name:
                found[f"{prefix}{index}.{name}"] = _place(layer, view, recurrent, name, module)
    return found


def _place(layer: nn.Module, view: MoEView | None, recurrent: list[str], name: str, module: nn.Module) -> str:
    if "Norm" in type(module).__name__:
        return NORMS
    if view is not None and _within(name, view.names["block"]):
        return _place_in_block(view, name, module)
    steps = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)]
    if any(type(layer.get_submodule(step)).__name__.endswith(ROUTER_WORDS) for step in steps):
        return ROUTERS
    first = name.partition(".")[0]
    if first in BESIDE:
        return SHARED
    if first in DENSE or "MLP" in type(layer.get_submodule(first)).__name__:
        return EXPERTS if _is_stack(module) else MLPS
    if any(_within(name, path) for path in recurrent):
        return RECURRENT if hasattr(module, "in_features") and not name.endswith(STEP_SIZE) else SCANS
    return PROJECTIONS


def _place_in_block(view: MoEView, name: str, module: nn.Module) -> str:
    """A map with one output is a gate (Qwen's shared experts)."""
    if _within(name, view.names["experts"]):
        return EXPERTS
    gate = name == view.names["block"] or getattr(module, "out_features", 0) == 1
    return ROUTERS if gate or _within(name, view.names["router"]) else SHARED


def _within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds one matrix an expert in a tensor of its own."""
    return any(tensor is not None and tensor.dim() == 3 for tensor in module._parameters.values())


def _mixers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of a layer, or members of its lists, that may mix tokens; those that an edit removed hold nothing."""
    for name, child in layer.named_children():
        inner = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for number, each in inner:
            named = name not in (*DENSE, *BESIDE) and not any(word in type(each).__name__ for word in ("Norm", "MLP"))
            if named and next(each.parameters(), None) is not None:
                yield f"{name}.{number}".rstrip("."), each


def _is_attention(path: str, mixer: nn.Module) -> bool:
    named = path.partition(".")[0] in ATTENTION_CHILDREN or "Attention" in type(mixer).__name__
    return named and (hasattr(mixer, "head_dim") or hasattr(mixer, "qk_head_dim"))


def _is_recurrent(layer: nn.Module, mixer: nn.Module) -> bool:
    """Whether layer or mixer says so, or the mixer has a convolution, as only those do."""
    if any(getattr(module, key, None) in LINEAR_MIXERS for module in (layer, mixer) for key in KINDS):
        return True
    return any(isinstance(module, nn.Conv1d) for module in mixer.modules())


def recurrent_mixers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Every mixer that keeps a state (or a convolution's window) in place of attention."""
    for layer in hf.decoder_layers(model):
        yield from (mixer for _, mixer in _mixers(layer) if _is_recurrent(layer, mixer))


# --- attention and scans ------------------------------------------------------------------------------------


def attentions_of(model: PreTrainedModel) -> Iterator[AttentionCost]:
    """Every attention over all tokens (or a window of them) that the model has left, layer by layer."""
    for layer in hf.decoder_layers(model):
        for path, mixer in _mixers(layer):
            if _is_attention(path, mixer) and not _is_recurrent(layer, mixer):
                yield _attention(model.config, layer, mixer)


def _attention(config: Any, layer: nn.Module, mixer: Any) -> AttentionCost:
    heads = int(getattr(mixer, "num_heads", None) or config.num_attention_heads)
    query = getattr(mixer, "qk_head_dim", None) or mixer.head_dim
    value = getattr(mixer, "v_head_dim", None) or mixer.head_dim
    pair = heads * int(query + value)
    indexer = getattr(mixer, "indexer", None)
    if indexer is not None:  # it weighs the scores of its own heads to choose whom the attention sees
        pair += int(indexer.n_heads * (indexer.head_dim + 1))
    expanding = getattr(mixer, EXPANDING, None)
    expansion = 0 if expanding is None else expanding.in_features * expanding.out_features
    return AttentionCost(2 * pair, _window(config, layer, mixer), expansion)


def _window(config: Any, layer: nn.Module, mixer: nn.Module) -> int | None:
    """How many tokens the cache of an attention holds at most; None: all."""
    kinds = [getattr(module, key, None) for module in (layer, mixer) for key in KINDS]
    by_layer, index = getattr(config, "layer_types", None), getattr(mixer, "layer_idx", None)
    if by_layer is not None and index is not None:
        kinds.append(by_layer[index])
    if "chunked_attention" in kinds:
        return int(config.attention_chunk_size)
    everywhere = getattr(config, "sliding_window", None) if getattr(config, "layer_types", None) is None else None
    return getattr(mixer, "sliding_window", everywhere) or None


def step_flops(mixer: nn.Module) -> int:
    """FLOPs that a recurrent mixer spends on its state for one token; 0 for one that is only a convolution."""
    for sides, each in STATES:
        sizes = [getattr(mixer, side, None) for side in sides]
        if all(isinstance(size, int) for size in sizes):
            return each * int(torch.Size(sizes).numel())  # type: ignore[arg-type]
    return 0
