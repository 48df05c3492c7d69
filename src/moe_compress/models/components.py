"""What a model holds and computes, component by component, from its modules alone: a skeleton is enough.

Two floating-point operations a multiply-add; packed matrices count as the weights that they hold; each token runs as
many experts as it uses on average. Norms, activations, softmax and rotary tables are not counted.

Prefill: every token attends to all T, the full square and not its causal half, in layers with a sliding window as
well, since that is what the kernels multiply; the head runs on every token. Decode: one token of each sequence, with
`context` tokens to attend to, its own included; of a layer with a window the cache holds no more than the window.
Latent attention (MLA) caches what it compressed and expands all of it again at every step, as transformers does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.component_map import (
    COMPONENTS,
    EXPERTS,
    HEAD,
    NORMS,
    PROJECTIONS,
    RECURRENT,
    SCANS,
    SCORES,
    TOWERS,
    attentions_of,
    component_of_modules,
    recurrent_mixers,
    step_flops,
)
from moe_compress.models.factor_counting import multiplied_times, shared_modules
from moe_compress.models.families import experts_per_token, family_of
from moe_compress.models.modeling.packed_linear import PARAMETERS as PACKED
from moe_compress.models.modeling.rerouting import NOVICES, REROUTE
from moe_compress.models.moe import all_moe_views

# Tokens of a prompt: more than one is all that it says.
MANY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """parameters, bytes: stored; touched: distinct parameters one token uses; prefill, decode: FLOPs.

    estimate: its FLOPs are only about right. Kernels scan in different ways; where the text decides how many experts
    run (skipped ones, constants, identities), they are an average or, where none was measured, the most there can be.
    """

    name: str
    parameters: int
    bytes: int
    touched: int
    prefill: int
    decode: int
    estimate: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(slots=True)
class _Sum:
    """step: of a decode step, multiplied."""

    parameters: int = 0
    bytes: int = 0
    touched: int = 0
    multiplied: int = 0
    step: int = 0


def components(
    model: PreTrainedModel,
    tokens: int,
    context: int,
    batch: int,
    stored: torch.dtype,
    *,
    scale_bytes: Mapping[int, float] | None = None,
    executed: bool = False,
) -> list[Component]:
    """All components of a model or a skeleton, also those that it lacks (but for towers), with FLOPs of both phases.

    tokens: of each of `batch` sequences in the prefill; context: tokens that each new one sees; stored: dtype on disk;
    scale_bytes: by bits, what a scale of packed weights takes there, if not that; executed: count what stock
    transformers runs, which is every expert on every token where the gate scales the input (Llama-4).
    """
    sums, attentions = _held(model, stored, scale_bytes or {}, executed, batch), list(attentions_of(model))
    family = family_of(model.config)
    scans = sum(step_flops(mixer, family) for mixer in recurrent_mixers(model))
    pairs = sum(each.pair for each in attentions)
    seen = sum(each.pair * min(context, each.window or context) for each in attentions)
    again = 2 * sum(each.expansion for each in attentions) * (context - 1)
    extra = {SCORES: (tokens * pairs, seen), SCANS: (scans, scans), PROJECTIONS: (0, again)}
    estimates = {SCANS} | ({EXPERTS} if _text_decides(model) else set())
    estimates |= {SCORES, RECURRENT} if family.rough_attention else set()
    found = []
    for name in COMPONENTS:
        if name == TOWERS and not sums[name].parameters:
            continue
        held, (prefill, decode) = sums[name], extra.get(name, (0, 0))
        found.append(
            Component(
                name=name,
                parameters=held.parameters,
                bytes=held.bytes,
                touched=held.touched,
                prefill=batch * tokens * (2 * held.multiplied + prefill),
                decode=batch * (2 * held.step + decode),
                estimate=name in estimates,
            )
        )
    return found


def absorbed_decode(model: PreTrainedModel, decode: int, context: int, batch: int) -> int | None:
    """FLOPs of a decode step (`decode` as `components` count it) where latent attention is absorbed, as engines run it.

    Queries are then multiplied with what is cached, which is never expanded: the expanding map is applied to the query
    and to the output instead, in as many multiply-adds as it takes for the new token. None without latent attention.
    """
    latent = [each for each in attentions_of(model) if each.absorbed]
    if not latent:
        return None
    expanded = sum(each.pair * context + 2 * each.expansion * (context - 1) for each in latent)
    return decode + batch * (sum(each.absorbed for each in latent) * context - expanded)


def _held(
    model: PreTrainedModel, stored: torch.dtype, scale_bytes: Mapping[int, float], executed: bool, batch: int
) -> Mapping[str, _Sum]:
    sums, place = {name: _Sum() for name in COMPONENTS}, component_of_modules(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    active, top_k = _active_experts(model, executed), float(experts_per_token(model.config))
    itemsize, times, again = stored.itemsize, _times(model), _multiplied(model, batch)
    for prefix, module in model.named_modules():
        held, count = sums[place[prefix]], times.get(id(module), 1)
        for name, parameter in module._parameters.items():
            if parameter is None or (tied and module is head):
                continue
            each = parameter.element_size() if name in PACKED else itemsize
            said = scale_bytes.get(int(module.bits), each) if name == PACKED[1] else each
            held.bytes += count * round(parameter.numel() * said)
            if name in PACKED:  # a packed matrix counts as the weights that it holds
                parameter = module.weight_like if name == PACKED[0] else parameter[:0]
            held.parameters += count * parameter.numel()
            if place[prefix] == TOWERS:
                continue
            if module is embedding or name == NOVICES:  # a token looks up a row, or one constant
                held.touched += parameter.shape[1]
                continue
            share = _share(place[prefix], parameter, *active.get(id(module), (top_k, None)))
            used = count * round(parameter.numel() * share)
            held.touched += used
            if _multiplies(place[prefix], name, parameter):
                often, at_a_step = again.get(id(module), (1.0, 1.0))
                held.multiplied += round(used * often)
                held.step += round(used * at_a_step)
        for name, buffer in module._buffers.items():
            lasts = buffer is not None and name not in module._non_persistent_buffers_set
            each = itemsize if buffer is None or buffer.is_floating_point() else buffer.element_size()
            held.bytes += count * buffer.numel() * each if lasts else 0
    if tied and isinstance(embedding, nn.Embedding):
        sums[HEAD].touched += embedding.weight.numel() - embedding.weight.shape[1]
        sums[HEAD].multiplied += embedding.weight.numel()
        sums[HEAD].step += embedding.weight.numel()
    return sums


def _times(model: PreTrainedModel) -> dict[int, int]:
    """By module: how often it stands among the experts of a layer, where it is one of several that are alike."""
    found: dict[int, int] = {}
    for view in all_moe_views(model).values():
        if view.unfused:
            experts = view.experts.separate._modules.values()
            counts = Counter(map(id, experts))
            unique = {id(each): each for each in experts if counts[id(each)] > 1}
            found |= {id(part): counts[key] for key, each in unique.items() for part in each.modules()}
    return found


def _multiplied(model: PreTrainedModel, batch: int) -> dict[int, tuple[float, float]]:
    """By module that holds a factor: multiply-adds for each number of it, in a prompt and in a step."""
    default, found = experts_per_token(model.config), dict[int, tuple[float, float]]()
    for view in all_moe_views(model).values():
        active, top_k = float(default if view.active is None else view.active), int(view.top_k or default)
        prompt = multiplied_times(view, active, top_k, MANY)
        step = multiplied_times(view, active, top_k, batch)
        found |= {key: (prompt.get(key, 1.0), step.get(key, 1.0)) for key in prompt | step}
    return found


def _multiplies(place: str, name: str, parameter: torch.Tensor) -> bool:
    matrix = parameter.dim() > 1 and not name.endswith("bias") and place != NORMS
    return matrix and (place != SCANS or name == "weight")  # what a state decays by is a matrix, but multiplies none


def _text_decides(model: PreTrainedModel) -> bool:
    """Whether how many experts run depends on the text: some are skipped, or replaced by constants or by nothing."""
    identities = family_of(model.config).identity_experts_key
    if identities and bool(getattr(model.config.get_text_config(), identities, 0)):
        return True
    experts = [view.experts for view in all_moe_views(model).values()]
    skipping = any(each.__dict__.get(REROUTE, {}).get("threshold") is not None for each in experts)
    return skipping or any(each._parameters.get(NOVICES) is not None for each in experts)


def _active_experts(model: PreTrainedModel, executed: bool) -> dict[int, tuple[float, int | None]]:
    """By module: experts that a token uses on average, and of how many (None: as many as the tensors have rows)."""
    found: dict[int, tuple[float, int | None]] = {}
    default = float(experts_per_token(model.config))
    for view in all_moe_views(model).values():
        active = default if view.active is None else view.active
        if executed and hf.gate_on_input(view.experts) and not view.unfused:
            active = view.num_experts
        found[id(view.experts)] = active, None
        if view.unfused:
            found |= {id(module): (active, view.num_experts) for module in view.experts.separate.modules()}
            found |= {id(module): (float(view.num_experts), view.num_experts) for module in shared_modules(view)}
    return found


def _share(place: str, parameter: torch.Tensor, active: float, count: int | None) -> float:
    """The share of a tensor that one token uses on average; 1 for everything but experts, and routed attention."""
    routed = parameter.dim() >= 2 if place == EXPERTS else place == PROJECTIONS and parameter.dim() == 3
    if count is None and not routed:
        return 1.0
    of = count or parameter.shape[0]
    return min(active, of) / of
