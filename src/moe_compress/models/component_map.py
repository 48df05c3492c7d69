"""Which component of a model each of its modules belongs to, and which of them mix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.moe import ROUTER_WORDS, MoEView, moe_view
from moe_compress.models.sublayers import KINDS, says_kind, within

EMBEDDING, HEAD, NORMS = "embedding", "head", "norms and other"
PROJECTIONS, SCORES = "attention projections", "attention scores and values"
RECURRENT, SCANS = "recurrent projections", "recurrent scans and convolutions"
ROUTERS, EXPERTS, SHARED, MLPS = "routers", "routed experts", "shared experts", "dense MLPs"
# What a wrapper has beside its language model, which no token of a text touches.
TOWERS = "other towers"
COMPONENTS = (EMBEDDING, PROJECTIONS, SCORES, RECURRENT, SCANS, ROUTERS, EXPERTS, SHARED, MLPS, NORMS, HEAD, TOWERS)
# Linear maps that run inside the scan, and the one by which latent attention expands what it has cached.
STEP_SIZE, EXPANDING = "dt_proj", "kv_b_proj"


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """One attention: FLOPs of a token with one other, tokens that it sees (None: all), the map that expands its cache.

    expansion: multiply-adds for each token in the cache; 0 where keys and values are cached; absorbed: FLOPs of a token
    with one other where queries meet what is cached as it is, that map being part of the projections; 0 likewise.
    """

    pair: int
    window: int | None
    expansion: int
    absorbed: int = 0


def component_of_modules(model: PreTrainedModel) -> dict[str, str]:
    """The component of every module, by its name in the model."""
    ends = {id(model.get_input_embeddings()): EMBEDDING, id(model.get_output_embeddings()): HEAD}
    towers = hf.tower_names(model)
    found = {
        name: TOWERS if any(within(name, tower) for tower in towers) else ends.get(id(module), NORMS)
        for name, module in model.named_modules()
    }
    family, prefix = family_of(model.config), hf.layers_prefix(model)
    for index, layer in enumerate(hf.decoder_layers(model)):
        view = moe_view(layer, family)
        recurrent = [path for path, mixer in _mixers(layer, family) if _is_recurrent(layer, family, mixer)]
        for name, _ in layer.named_modules():
            if name:
                found[f"{prefix}{index}.{name}"] = _place(layer, family, view, recurrent, name)
    return found


def _place(layer: nn.Module, family: Family, view: MoEView | None, recurrent: list[str], name: str) -> str:
    module = layer.get_submodule(name)
    steps = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)]
    kinds = [type(layer.get_submodule(step)).__name__ for step in steps]
    if "Norm" in kinds[0] or any("HyperConnection" in kind for kind in kinds):
        return NORMS
    if view is not None and any(within(name, view.names[part]) for part in ("block", "experts", "router")):
        return _place_in_block(view, name, module)
    if any(kind.endswith(ROUTER_WORDS) for kind in kinds):
        return ROUTERS
    first = name.partition(".")[0]
    if first in family.beside:
        return SHARED
    if first in family.dense or "MLP" in type(layer.get_submodule(first)).__name__:
        return EXPERTS if _is_stack(module) else MLPS
    if any(within(name, path) for path in recurrent):
        return RECURRENT if hasattr(module, "in_features") and not name.endswith(STEP_SIZE) else SCANS
    return PROJECTIONS


def _place_in_block(view: MoEView, name: str, module: nn.Module) -> str:
    """A map with one output is a gate (Qwen's shared experts)."""
    if within(name, view.names["experts"]):
        return EXPERTS
    gate = name == view.names["block"] or getattr(module, "out_features", 0) == 1
    return ROUTERS if gate or within(name, view.names["router"]) else SHARED


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds one matrix an expert in a tensor of its own."""
    return any(tensor is not None and tensor.dim() == 3 for tensor in module._parameters.values())


def _mixers(layer: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Children of a layer, or members of its lists, that may mix tokens; those that an edit removed hold nothing.

    Of a child that is more than the attention that its family names inside it, that attention.
    """
    inside = {name for name in family.attention if "." in name and name in dict(layer.named_modules())}
    yield from ((name, layer.get_submodule(name)) for name in inside)
    for name, child in layer.named_children():
        if any(within(path, name) for path in inside):
            continue
        inner = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for number, each in inner:
            named = name not in (*family.dense, *family.beside) and not any(
                word in type(each).__name__ for word in ("Norm", "MLP")
            )
            if named and next(each.parameters(), None) is not None:
                yield f"{name}.{number}".rstrip("."), each


def _is_attention(family: Family, path: str, mixer: nn.Module) -> bool:
    named = (
        path in family.attention or path.partition(".")[0] in family.attention or "Attention" in type(mixer).__name__
    )
    return named and (hasattr(mixer, "head_dim") or hasattr(mixer, "qk_head_dim"))


def _is_recurrent(layer: nn.Module, family: Family, mixer: nn.Module) -> bool:
    """Whether layer or mixer says so, or the mixer has a convolution, as only those do."""
    if says_kind(layer, mixer, family.recurrent_kinds):
        return True
    return any(isinstance(module, nn.Conv1d) for module in mixer.modules())


def recurrent_mixers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Every mixer that keeps a state (or a convolution's window) in place of attention."""
    family = family_of(model.config)
    for layer in hf.decoder_layers(model):
        yield from (mixer for _, mixer in _mixers(layer, family) if _is_recurrent(layer, family, mixer))


# --- attention and scans ------------------------------------------------------------------------------------


def attentions_of(model: PreTrainedModel) -> Iterator[AttentionCost]:
    """Every attention over all tokens (or a window of them) that the model has left, layer by layer."""
    family = family_of(model.config)
    for layer in hf.decoder_layers(model):
        for path, mixer in _mixers(layer, family):
            if _is_attention(family, path, mixer) and not _is_recurrent(layer, family, mixer):
                yield _attention(model.config.get_text_config(), layer, mixer)


def _attention(config: Any, layer: nn.Module, mixer: Any) -> AttentionCost:
    heads = int(getattr(mixer, "num_heads", None) or config.num_attention_heads)
    query = getattr(mixer, "qk_head_dim", None) or mixer.head_dim
    value = getattr(mixer, "v_head_dim", None) or mixer.head_dim
    pair = heads * int(query + value)
    indexer, chosen = getattr(mixer, "indexer", None), 0
    if indexer is not None:  # scores of heads of its own choose whom the attention sees, weighed and summed by most
        scorers = getattr(indexer, "n_heads", None) or indexer.num_heads
        chosen = int(scorers * (indexer.head_dim + hasattr(indexer, "weights_proj")))
    window, expanding = _window(config, layer, mixer), getattr(mixer, EXPANDING, None)
    if expanding is None:
        return AttentionCost(2 * (pair + chosen), window, 0)
    latent = expanding.in_features
    absorbed = heads * int(2 * latent + mixer.qk_rope_head_dim)
    return AttentionCost(2 * (pair + chosen), window, latent * expanding.out_features, 2 * (absorbed + chosen))


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


def step_flops(mixer: nn.Module, family: Family) -> int:
    """FLOPs that a recurrent mixer spends on its state for one token; 0 for one that is only a convolution."""
    for state in family.recurrent_states:
        sizes = [getattr(mixer, side, None) for side in state.sides]
        if all(isinstance(size, int) for size in sizes):
            return state.flops * int(torch.Size(sizes).numel())  # type: ignore[arg-type]
    return 0
