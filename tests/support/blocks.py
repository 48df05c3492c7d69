"""MoE blocks of tiny models by name, with their routers' logits and choices."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.families import family_of, groups_of
from moe_compress.models.moe import MoEView, moe_views
from moe_compress.models.router_rule import RouterRule, fit_router_rule, selection_bias
from support import tiny

IDS = tiny.token_ids(rows=4, length=12)

SIXTEEN = {"n_routed_experts": 16, "num_experts_per_tok": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "v2 four groups": (
        "deepseek_v2",
        {
            **SIXTEEN,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "v3 four groups": ("deepseek_v3", {**SIXTEEN, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "v3 not renormalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    "qwen3 not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "olmoe renormalised": ("olmoe", {"norm_topk_prob": True}),
    "lfm2 scaled": ("lfm2_moe", {"routed_scaling_factor": 3.0}),
    "one expert": ("mixtral", {"num_experts_per_tok": 1}),
}


@dataclass
class Block:
    """The first MoE block of a model, how it was called, and what its router did."""

    config: Any
    layer: nn.Module
    view: MoEView
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits_TE: Tensor
    index_TK: Tensor
    gate_TK: Tensor

    def identified(self) -> RouterRule | None:
        family, (groups, used) = family_of(self.config), groups_of(self.config)
        return fit_router_rule(
            self.logits_TE,
            self.index_TK,
            self.gate_TK,
            top_k=self.index_TK.shape[1],
            scores=family.router_scores,
            groups=groups,
            groups_used=used,
            group_best=family.min_per_group,
            bias_E=selection_bias(self.view),
        )


@torch.no_grad()
def applied(layer: nn.Module, view: MoEView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Logits, experts and gates of one run of a block, from what its router returns and what its experts are given."""
    seen: dict[str, Any] = {}
    handles = [
        view.router.register_forward_hook(lambda _m, _a, out: seen.update(router=out)),
        view.experts.register_forward_pre_hook(lambda _m, args: seen.update(given=args)),
    ]
    layer.get_submodule(view.names["block"])(*args, **kwargs)
    for handle in handles:
        handle.remove()
    if len(seen["given"]) == 3:
        logits = seen["router"] if isinstance(seen["router"], Tensor) else seen["router"][0]
        return logits.reshape(-1, logits.shape[-1]), *seen["given"][1:]
    scores_TE, logits_TE = seen["router"]
    index_TK = logits_TE.topk(view.block.top_k).indices
    return logits_TE, index_TK, scores_TE.gather(1, index_TK)


@torch.no_grad()
def block_of(model: PreTrainedModel) -> Block | None:
    views = moe_views(model)
    if not views:
        return None
    index, view = next(iter(views.items()))
    layer, calls = hf.decoder_layers(model)[index], []
    hook = view.block.register_forward_pre_hook(lambda _m, a, k: calls.append((a, k)), with_kwargs=True)
    model(IDS, use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    return Block(model.config, layer, view, args, kwargs, *applied(layer, view, args, kwargs))


@functools.cache
def made(name: str) -> Block | None:
    family, overrides = VARIANTS.get(name, (name, {}))
    return block_of(tiny.make(family, **overrides))


def dense(index_TK: Tensor, gate_TK: Tensor, experts: int) -> Tensor:
    """Gates [T, E], zero where an expert is not used."""
    return torch.zeros(len(index_TK), experts, dtype=gate_TK.dtype).scatter_add_(1, index_TK, gate_TK)
