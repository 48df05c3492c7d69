"""Samples of outputs: observed, computed by real modules, and made up."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models.families import family_of
from moe_compress.models.modeling.edit_layer import keep_experts
from moe_compress.models.router_rule import RouterRule
from moe_compress.models.shape import MoEShape, moe_shapes
from support import tiny
from support.blocks import VARIANTS, Block, block_of, made
from support.tiny import windows_of

CPU = torch.device("cpu")
IDS = tiny.token_ids(rows=4, length=12)
PADDED = torch.arange(12)[None] < torch.tensor([12, 7, 3, 10])[:, None]
SAMPLE = 20


def probed(checkpoint: Checkpoint, sample: int = SAMPLE, mask: Tensor = PADDED) -> dict[int, OutputSample]:
    """Layer -> the output sample of a checkpoint on the test's text."""
    observer = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(mask.sum()), sample)
    seen, _ = forward_layers(StreamedLayers(checkpoint, CPU, torch.float32), windows_of(IDS, mask), [observer])
    return {index: OutputSample.from_tensors(parts[0]) for index, parts in enumerate(seen) if parts[0]}


@dataclass
class Real:
    """A block in float64, its output sample put together by hand, and what it adds with any of its experts left."""

    block: Block
    shape: MoEShape
    output_sample: OutputSample
    outputs_TED: Tensor
    target_TD: Tensor

    @torch.no_grad()
    def loss(self, kept: tuple[int, ...]) -> float:
        """Run the block without the others: |target - output| / |target|."""
        layer = copy.deepcopy(self.block.layer)
        names = self.block.view.names
        keep_experts(layer, names, experts=kept)
        seen: list[Tensor] = []
        layer.get_submodule(names["experts"]).register_forward_hook(lambda _m, _a, out: seen.append(out))
        layer.get_submodule(names["block"])(*self.block.args, **self.block.kwargs)
        return float((seen[0] - self.target_TD).norm() / self.target_TD.norm())


@functools.cache
def real(name: str) -> Real:
    family, overrides = VARIANTS.get(name, (name, {}))
    model = tiny.make(family, **overrides)
    model.set_experts_implementation("eager")
    block = block_of(model.double())
    experts, (hidden_TD, index_TK, gate_TK) = block.view.experts, given(block)
    outputs_TED, target_TD = outputs_of(experts, hidden_TD), experts(hidden_TD, index_TK, gate_TK).detach()
    sample = output_sample_of(block.logits_TE.double(), outputs_TED, target_TD, made(name).identified())
    return Real(block, moe_shapes(model)[0], sample, outputs_TED, target_TD)


def given(block: Block) -> tuple[Tensor, ...]:
    """What the block's experts are called with."""
    calls: list[tuple] = []
    hook = block.view.experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
    with torch.no_grad():
        block.view.block(*block.args, **block.kwargs)
    hook.remove()
    return calls[0]


@torch.no_grad()
def outputs_of(experts: Any, hidden_TD: Tensor) -> Tensor:
    """Every expert alone on every token, before any gate [T, E, D]."""
    alone = [
        experts(hidden_TD, torch.full((len(hidden_TD), 1), e), torch.ones(len(hidden_TD), 1, dtype=hidden_TD.dtype))
        for e in range(tiny.EXPERTS)
    ]
    return torch.stack(alone, 1)


def output_sample_of(
    logits_TE: Tensor, outputs_TED: Tensor, target_TD: Tensor, routing: RouterRule, ranked: int | None = None
) -> OutputSample:
    """An output sample by hand, in float64: each token's experts in the order in which it would choose them."""
    tokens, experts = logits_TE.shape
    ranked = ranked or experts
    everyone = torch.ones(experts, dtype=torch.bool)
    index_TK, gate_TK = routing.route(logits_TE, everyone)
    order_TE = routing.score(logits_TE, everyone) + (0 if routing.bias_E is None else routing.bias_E.double())
    ids, grams = [], []
    for t in range(tokens):
        used = index_TK[t].tolist()
        best = sorted(range(experts), key=lambda e, t=t, used=used: (e not in used, -float(order_TE[t, e])))[:ranked]
        rows = torch.cat([outputs_TED[t, best], target_TD[t][None]])
        ids.append(best)
        grams.append(rows @ rows.T)
    nothing = torch.zeros(0)
    return OutputSample(
        logits_TE=logits_TE,
        index_TK=index_TK,
        gate_TK=gate_TK,
        component_T=torch.zeros(tokens, dtype=torch.long),
        ids_TM=torch.tensor(ids),
        gram_TNN=torch.stack(grams),
        mean_ED=nothing,
        cosine_EE=nothing,
        inner_EFS=nothing,
        routing=routing,
    )


def sets_of(shape: MoEShape, keep: int) -> list[tuple[int, ...]]:
    """All sets of `keep` experts with as many in each group as in the next."""
    size = shape.num_experts // shape.groups
    return [
        kept
        for kept in itertools.combinations(range(shape.num_experts), keep)
        if len({sum(e // size == g for e in kept) for g in range(shape.groups)}) == 1
    ]


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def naive_gates(rule: RouterRule, logits: list[float], kept: list[int]) -> dict[int, float]:
    """One token's gates with only `kept` left, by the book."""
    if rule.scores == "softmax":
        score = dict(zip(kept, softmax([logits[e] for e in kept]), strict=True))
    else:
        score = {e: 1 / (1 + math.exp(-logits[e])) for e in kept}
    choice = {e: score[e] + (0 if rule.bias_E is None else float(rule.bias_E[e])) for e in kept}
    size = len(logits) // rule.groups
    judged = {}
    for g in range(rule.groups):
        members = sorted((choice[e] for e in kept if e // size == g), reverse=True)
        judged[g] = sum(members[: rule.group_best]) if members else -math.inf
    best_groups = sorted(judged, key=lambda g: -judged[g])[: rule.groups_used]
    chosen = sorted((e for e in kept if e // size in best_groups), key=lambda e: -choice[e])[: rule.top_k]
    total = sum(score[e] for e in chosen) if rule.renormalised else 1
    return {e: rule.scale * score[e] / total for e in chosen}


RULE_KINDS: dict[str, dict[str, Any]] = {
    "softmax renormalised": {"scores": "softmax", "renormalised": True},
    "softmax": {"scores": "softmax", "renormalised": False, "scale": 2.0},
    "sigmoid": {"scores": "sigmoid", "renormalised": False},
    "sigmoid biased": {"scores": "sigmoid", "renormalised": True, "scale": 2.5, "bias_E": True},
    "softmax biased": {"scores": "softmax", "renormalised": True, "bias_E": True},
    "groups by two": {"scores": "sigmoid", "renormalised": True, "bias_E": True}
    | {"groups": 4, "groups_used": 2, "group_best": 2},
    "groups by one": {"scores": "softmax", "renormalised": False, "groups": 4, "groups_used": 2},
}


@dataclass
class Made:
    """A layer made up: logits, experts' outputs and the output sample of them."""

    shape: MoEShape
    output_sample: OutputSample
    outputs_TED: Tensor

    def added(self, token: int, kept: list[int], unknown: bool = False) -> Tensor:
        """A token's routed output with only `kept` left; `unknown`: without experts that are not in its list."""
        gates = naive_gates(self.output_sample.routing, self.output_sample.logits_TE[token].tolist(), kept)
        listed = self.output_sample.ids_TM[token].tolist()
        parts = [g * self.outputs_TED[token, e] for e, g in gates.items() if not unknown or e in listed]
        return sum(parts, torch.zeros(self.outputs_TED.shape[2], dtype=torch.float64))

    def loss(self, kept: list[int], unknown: bool = False) -> float:
        everyone = list(range(self.shape.num_experts))
        target = torch.stack([self.added(t, everyone) for t in range(len(self.outputs_TED))])
        left = torch.stack([self.added(t, kept, unknown) for t in range(len(self.outputs_TED))])
        return float((target - left).norm() / target.norm())


@functools.cache
def made_up(kind: str, experts: int = 12, tokens: int = 40, ranked: int | None = None, seed: int = 0) -> Made:
    """Random logits; experts come in families of three that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(RULE_KINDS[kind])
    if options.get("bias_E"):
        options["bias_E"] = torch.randn(experts, generator=generator) * 0.1
    rule = RouterRule(top_k=3, **options)
    logits_TE = 1.5 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    outputs_TED = torch.randn(tokens, experts, 6, generator=generator, dtype=torch.float64)
    outputs_TED = outputs_TED + 2 * outputs_TED[:, torch.arange(experts) % (experts // 3)]
    everyone = list(range(experts))
    target_TD = torch.stack(
        [
            sum(g * outputs_TED[t, e] for e, g in naive_gates(rule, logits_TE[t].tolist(), everyone).items())
            for t in range(tokens)
        ]
    )
    shape = MoEShape(
        layer=0, num_experts=experts, top_k=3, groups=rule.groups, groups_used=rule.groups_used,
        min_per_group=rule.group_best,
    )  # fmt: skip
    return Made(shape, output_sample_of(logits_TE, outputs_TED, target_TD, rule, ranked), outputs_TED)


def target(found: Made, token: int) -> Tensor:
    """The target in the made-up output sample, which belongs to the logits it was made with."""
    return found.added(token, list(range(found.shape.num_experts)))
