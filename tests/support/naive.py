"""Expert scores computed the slow way: float64, one token and one expert at a time, straight from the formulas.

Nothing here uses the package. The stock model (eager experts) only supplies the hidden states that enter each MoE
block and leave each layer; routing and experts are redone by hand, and their sum is checked against what the stock
experts returned. For each token routed to expert j, with gate g and output f (llama4's gate multiplies the expert's
*input*: there f is its contribution over g), sums and means over those tokens:
frequency = count, gate_mass = sum g, ean = sum |f|, man = mean |f|, msan = mean |f|^2, weighted_ean = sum g |f|,
reap = mean g |f|, max_activation = largest entry of f in absolute value, easy_ep = sum max(0, 1 - cos(h - added, h))
g |f| with h the layer's output and `added` what the routed experts added to it (Granite and MiniMax scale their sum).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BLOCK = dict.fromkeys(("granitemoe", "granitemoeshared"), "block_sparse_moe") | {"nemotron_h": "mixer"}
BLOCK |= {**dict.fromkeys(("llama4_text", "jamba", "lfm2_moe"), "feed_forward"), "dbrx": "ffn"}
ROUTER = dict.fromkeys(("gpt_oss", "granitemoe", "granitemoeshared", "llama4_text", "phimoe", "jamba"), "router")
ROUTER |= {"hunyuan_v1_moe": "gate.wg", "afmoe": "router.gate", "dbrx": "router.layer"}


@dataclass
class Routing:
    """One token's choice: expert ids, their gate weights, and the probability of every expert."""

    ids: list[int]
    gates: list[Tensor]
    probability: Tensor


def _softmax(x: Tensor) -> Tensor:
    exps = [torch.exp(v - x.max()) for v in x]
    return torch.stack([v / sum(exps) for v in exps])


def _best(x: Tensor, k: int) -> list[int]:
    return sorted(range(len(x)), key=lambda i: -float(x[i]))[:k]


def _renormalised(gates: list[Tensor]) -> list[Tensor]:
    return [g / sum(gates) for g in gates]


Router = Callable[[Any, Tensor, Any], Routing]


def _softmax_then_topk(renormalise: bool | str, k: str = "num_experts_per_tok", scale: str = "") -> Router:
    def route(config: Any, logits: Tensor, bias: Any) -> Routing:
        p = _softmax(logits)
        ids = _best(p + bias, getattr(config, k))
        gates = [p[i] for i in ids]
        if getattr(config, renormalise) if isinstance(renormalise, str) else renormalise:
            gates = _renormalised(gates)
        return Routing(ids, [g * (getattr(config, scale) if scale else 1) for g in gates], p)

    return route


def _sigmoid_then_topk(renormalise: str = "", scale: str = "") -> Router:
    def route(config: Any, logits: Tensor, bias: Any) -> Routing:
        s = 1 / (1 + torch.exp(-logits))
        choice, groups = s + bias, getattr(config, "n_group", 1)
        size = len(s) // groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        group_scores = torch.stack([sum(sorted((choice[i] for i in ids), reverse=True)[:2]) for ids in members])
        used = config.topk_group if groups > 1 else 1
        allowed = [i for g in _best(group_scores, used) for i in members[g]]
        ids = [allowed[i] for i in _best(choice[allowed], config.num_experts_per_tok)]
        gates = [s[i] for i in ids]
        if not renormalise or getattr(config, renormalise):
            gates = _renormalised(gates)
        return Routing(ids, [g * (getattr(config, scale) if scale else 1) for g in gates], s / sum(s))

    return route


def _topk_then_softmax(config: Any, logits: Tensor, bias: Any) -> Routing:
    ids = _best(logits, config.num_experts_per_tok)
    return Routing(ids, list(_softmax(logits[ids])), _softmax(logits))


def _topk_then_sigmoid(config: Any, logits: Tensor, bias: Any) -> Routing:
    s = 1 / (1 + torch.exp(-logits))
    ids = _best(logits, config.num_experts_per_tok)
    return Routing(ids, [s[i] for i in ids], s / sum(s))


def _root_of_softplus(config: Any, logits: Tensor, bias: Any) -> Routing:
    s = torch.sqrt(torch.log(1 + torch.exp(logits)))
    ids = _best(s + bias, config.num_experts_per_tok)
    gates = [g * config.routed_scaling_factor for g in _renormalised([s[i] for i in ids])]
    return Routing(ids, gates, _softmax(logits))


def _beside_shared(config: Any, logits: Tensor, bias: Any) -> Routing:
    s, routed = 1 / (1 + torch.exp(-logits)), len(logits) - config.n_shared_experts
    ids = _best(s[:routed] + bias, config.num_experts_per_tok)
    gates = _renormalised([s[i] for i in [*ids, *range(routed, len(logits))]])[: len(ids)]
    return Routing(ids, [g * config.route_scale for g in gates], s[:routed] / sum(s[:routed]))


def _sparsemixer(config: Any, logits: Tensor, bias: Any) -> Routing:
    ids, gates, left = [], [], list(range(len(logits)))
    for _ in range(2):
        best = max(left, key=lambda i: float(logits[i]))
        top, near = logits[best], 2 * config.router_jitter_noise
        close = [i for i in left if (top - logits[i]) / max(logits[i].abs(), top) <= near]
        ids.append(best)
        gates.append(_softmax(logits[close])[close.index(best)])
        left.remove(best)
    return Routing(ids, gates, _softmax(logits))


_V3 = _sigmoid_then_topk("norm_topk_prob", "routed_scaling_factor")
_IF_ASKED = _softmax_then_topk("norm_topk_prob")
ROUTE: dict[str, Router] = {
    **dict.fromkeys(("mixtral", "minimax"), _softmax_then_topk(True)),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo"), _IF_ASKED),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "dots1", "nemotron_h", "lfm2_moe"), _V3),
    **dict.fromkeys(("exaone_moe", "mimo_v2_flash", "glm_moe_dsa", "hy_v4"), _V3),
    "deepseek_v4": _root_of_softplus,
    "inkling_text": _beside_shared,
    **dict.fromkeys(("gpt_oss", "granitemoe", "granitemoeshared"), _topk_then_softmax),
    "deepseek_v2": _softmax_then_topk(False, scale="routed_scaling_factor"),
    "jamba": _softmax_then_topk(False),
    "ernie4_5_moe": _softmax_then_topk(True, k="moe_k"),
    "hunyuan_v1_moe": _softmax_then_topk(True, k="moe_topk"),
    "dbrx": lambda config, *found: _softmax_then_topk(True, k="moe_top_k")(config.ffn_config, *found),
    "minimax_m2": _sigmoid_then_topk(),
    "afmoe": _sigmoid_then_topk(scale="route_scale"),
    "llama4_text": _topk_then_sigmoid,
    "phimoe": _sparsemixer,
}


@dataclass
class Expert:
    """One expert as plain [out, in] matrices and a function of one token."""

    matrices: list[Tensor]
    run: Callable[[Tensor], Tensor]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def expert(family: str, config: Any, experts: nn.Module, e: int) -> Expert:
    """Read expert `e` out of the fused parameters by hand."""
    down = experts.down_proj[e]
    if family == "nemotron_h":
        up = experts.up_proj[e]
        return Expert([up, down], lambda x: down @ torch.clamp(up @ x, min=0) ** 2)
    fused = experts.gate_up_proj[e]
    if family == "gpt_oss":
        down = down.T
        gate, up = fused[:, 0::2].T, fused[:, 1::2].T
        gate_bias, up_bias = experts.gate_up_proj_bias[e, 0::2], experts.gate_up_proj_bias[e, 1::2]

        def clamped(x: Tensor) -> Tensor:
            g = torch.clamp(gate @ x + gate_bias, max=config.swiglu_limit)
            u = torch.clamp(up @ x + up_bias, -config.swiglu_limit, config.swiglu_limit)
            return down @ ((u + 1) * g / (1 + torch.exp(-config.swiglu_alpha * g))) + experts.down_proj_bias[e]

        return Expert([gate, up, down], clamped)
    if family == "llama4_text":
        fused, down = fused.T, down.T
    inner = down.shape[1]
    gate, up = fused[:inner], fused[inner:]
    return Expert([gate, up, down], lambda x: down @ (_silu(gate @ x) * (up @ x)))


@dataclass
class LayerReference:
    """Per-expert lists of one layer, filled token by token."""

    experts: int
    gates: list[list[float]] = field(init=False)
    norms: list[list[float]] = field(init=False)
    peaks: list[list[float]] = field(init=False)
    shifts: list[list[float]] = field(init=False)
    probability: Tensor = field(init=False)
    weights: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gates, self.norms, self.peaks, self.shifts = ([[] for _ in range(self.experts)] for _ in range(4))
        self.probability = torch.zeros(self.experts, dtype=torch.float64)

    def scores(self) -> dict[str, Tensor]:
        """Every score of every expert; a mean over no token is NaN."""
        columns: dict[str, list[float]] = {name: list(values) for name, values in self.weights.items()}
        for g, n, p, s in zip(self.gates, self.norms, self.peaks, self.shifts, strict=True):
            count = len(g)
            total_gn = sum(a * b for a, b in zip(g, n, strict=True))
            row = {
                "frequency": float(count),
                "gate_mass": sum(g),
                "ean": sum(n),
                "man": sum(n) / count if count else float("nan"),
                "msan": sum(v * v for v in n) / count if count else float("nan"),
                "weighted_ean": total_gn,
                "reap": total_gn / count if count else float("nan"),
                "max_activation": max(p, default=0.0),
                "easy_ep": sum(a * b * c for a, b, c in zip(s, g, n, strict=True)),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        columns["gate_mass_full"] = self.probability.tolist()
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def _weight_scores(router: Tensor, experts: list[Expert]) -> dict[str, list[float]]:
    flat = [torch.cat([m.reshape(-1) for m in one.matrices]) for one in experts]
    return {
        "router_norm": [float(row.pow(2).sum().sqrt()) for row in router],
        "weight_norm": [float(w.pow(2).sum().sqrt()) for w in flat],
        "aimer": [-float(w.abs().mean() / w.pow(2).mean().sqrt()) for w in flat],
    }


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    stack = model.model if hasattr(model, "model") else model.base_model
    return stack.layers if hasattr(stack, "layers") else stack.blocks


def _captured(model: PreTrainedModel, family: str, ids: Tensor, mask: Tensor) -> dict[int, dict[str, Tensor]]:
    """Layer -> what enters its MoE block, what its experts return, what the layer returns; one row a token."""
    seen: dict[int, dict[str, Tensor]] = {}
    handles = []
    for index, layer in enumerate(layers_of(model)):
        block = getattr(layer, BLOCK.get(family, "mlp"))
        if not hasattr(block, "experts") or getattr(block, "is_hash", False):
            continue
        slot = seen.setdefault(index, {})

        def enter(_m: nn.Module, args: tuple, slot: dict = slot) -> None:
            slot["entering"] = args[0].reshape(-1, args[0].shape[-1]).clone()

        def mixed(_m: nn.Module, _args: tuple, out: Tensor, slot: dict = slot) -> None:
            slot["routed"] = out.reshape(-1, len(slot["entering"]), out.shape[-1]).sum(0)

        def leave(_m: nn.Module, _args: tuple, out: Any, slot: dict = slot) -> None:
            slot["leaving"] = _tensor(out).reshape(-1, _tensor(out).shape[-1]).clone()

        handles += [block.register_forward_pre_hook(enter), block.experts.register_forward_hook(mixed)]
        handles.append(layer.register_forward_hook(leave))
    model(ids, attention_mask=mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _contributions(routing: Routing, experts: list[Expert], x: Tensor, on_input: bool) -> list[Tensor]:
    chosen = zip(routing.ids, routing.gates, strict=True)
    return [experts[e].run(g * x) if on_input else g * experts[e].run(x) for e, g in chosen]


def _add(into: LayerReference, routing: Routing, contributions: list[Tensor], before: Tensor, after: Tensor) -> None:
    """Add one token to the reference."""
    shift = max(0.0, 1 - float(before @ after / (before.norm() * after.norm())))
    for e, g, contribution in zip(routing.ids, routing.gates, contributions, strict=True):
        f = contribution / g
        into.gates[e].append(float(g))
        into.norms[e].append(float(f.norm()))
        into.peaks[e].append(float(f.abs().max()))
        into.shifts[e].append(shift)
    into.probability += routing.probability


@torch.no_grad()
def reference(
    model: PreTrainedModel, family: str, ids: Tensor, mask: Tensor | None = None
) -> dict[int, LayerReference]:
    """Layer -> the per-expert lists of every real token of `ids`."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    model, config = model.double(), model.config
    model.set_experts_implementation("eager")
    scale = getattr(config, "residual_multiplier", 1) * getattr(config, "mlp_beta_factor", 1)
    found = {}
    for index, seen in _captured(model, family, ids, mask).items():
        block = getattr(layers_of(model)[index], BLOCK.get(family, "mlp"))
        router = block.get_submodule(ROUTER.get(family, "gate"))
        named = [*block.named_buffers(), *block.named_parameters()]
        bias = sum(b.reshape(-1) for n, b in named if n.endswith(("e_score_correction_bias", "expert_bias")))
        count = block.experts.num_experts if family == "inkling_text" else len(router.weight)
        experts = [expert(family, config, block.experts, e) for e in range(count)]
        layer = found[index] = LayerReference(count, weights=_weight_scores(router.weight[:count], experts))
        for token in mask.reshape(-1).nonzero()[:, 0].tolist():
            x = seen["entering"][token]
            logits = router.weight @ x + (router.bias if family == "gpt_oss" else 0)
            routing = ROUTE[family](config, logits, bias)
            contributions = _contributions(routing, experts, x, on_input=family == "llama4_text")
            torch.testing.assert_close(sum(contributions), seen["routed"][token].double(), rtol=1e-5, atol=1e-6)
            after = seen["leaving"][token]
            _add(layer, routing, contributions, after - scale * sum(contributions), after)
    return found
