"""Pruning computed the slow way: float64, one expert and one column at a time, straight from the papers.

Nothing here uses the package. A mask is True where a weight is removed; a matrix is [out, in], as in y = W x.
Magnitude removes the smallest |w| of a whole matrix; Wanda (arXiv 2306.11695) the smallest |w_ij| sqrt(mean_t x_tj^2)
of each row; SparseGPT (arXiv 2301.00774) goes from column to column, removes the smallest w_ij^2 / [H_j^-1]_jj, where
H_j is what is left of the Hessian X'X from column j on, and lets the later columns make up for it (OBS). What each
expert sees is redone from the hidden states that enter its block, as in naive.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from support import naive

Share = float | tuple[int, int]
BLOCK = 128
DAMPING = 0.01


def _smallest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: scores[i])[:count])


def _flags(chosen: set[int], like: Tensor) -> Tensor:
    return torch.tensor([i in chosen for i in range(like.numel())]).view(like.shape)


def in_matrix(scores: Tensor, share: float) -> Tensor:
    """The lowest scores of the whole matrix."""
    return _flags(_smallest(scores.flatten().tolist(), round(share * scores.numel())), scores)


def in_rows(scores: Tensor, share: float) -> Tensor:
    """The lowest scores of each row."""
    return torch.stack([_flags(_smallest(row.tolist(), round(share * len(row))), row) for row in scores])


def in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """All but the highest `kept` of every `group` consecutive inputs."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for o, row in enumerate(scores.tolist()):
        for start in range(0, len(row), group):
            for i in _smallest(row[start : start + group], group - kept):
                mask[o, start + i] = True
    return mask


def magnitude(weight: Tensor, share: Share) -> Tensor:
    """The mask of the smallest weights."""
    scores = weight.double().abs()
    return in_groups(scores, *share) if isinstance(share, tuple) else in_matrix(scores, share)


def wanda(weight: Tensor, inputs: Tensor, share: Share) -> Tensor:
    """The mask; inputs: what the matrix was multiplied with, a row each."""
    rms = [(sum(x * x for x in column) / len(column)) ** 0.5 for column in inputs.double().T.tolist()]
    scores = weight.double().abs() * torch.tensor(rms, dtype=torch.float64)
    return in_groups(scores, *share) if isinstance(share, tuple) else in_rows(scores, share)


def sparsegpt(weight: Tensor, inputs: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """What is left of the weight, and the mask. The inverse of what is left of H is taken anew for every column.

    Weights of inputs that are always zero count as 0 in the choice; those that it leaves keep their value.
    """
    w, x = weight.double().clone(), inputs.double()
    hessian = x.T @ x
    count = len(hessian)
    live = [float(number) for number in hessian.diagonal() if number != 0]
    for j in range(count):
        if hessian[j, j] == 0:
            hessian[j, j] = sum(live) / len(live) if live else 1
            w[:, j] = 0
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(count)]
    mask = torch.zeros(w.shape, dtype=torch.bool)
    step = share[1] if isinstance(share, tuple) else BLOCK
    for j in range(count):
        if j % step == 0:
            end = min(j + step, count)
            scores = torch.stack([w[:, i] ** 2 / inverse[i][0, 0] for i in range(j, end)], 1)
            if isinstance(share, tuple):
                mask[:, j:end] = in_groups(scores, *share)
            else:
                missing = round(share * len(w) * end) - int(mask.sum())
                mask[:, j:end] = _flags(_smallest(scores.flatten().tolist(), missing), scores)
        error = torch.where(mask[:, j], w[:, j], 0.0) / inverse[j][0, 0]
        w[:, j:] -= error.unsqueeze(1) * inverse[j][0]
        w[:, j] = torch.where(mask[:, j], 0.0, w[:, j])
    idle = (x == 0).all(0)
    w[:, idle] = torch.where(mask, 0.0, weight.double())[:, idle]
    return w, mask


def loss(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    """What changed in the outputs, squared and summed."""
    return float(((weight.double() - pruned.double()) @ inputs.double().T).square().sum())


@dataclass
class Rows:
    """What one expert sees, a row per token: its inputs, the inputs of its down projection, and the gates."""

    inputs: list[Tensor] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)
    gates: list[float] = field(default_factory=list)

    def source(self, down: bool) -> Tensor:
        """The inputs of one of its matrices."""
        return torch.stack(self.inner if down else self.inputs)


def block_of(model: PreTrainedModel, family: str, layer: int) -> nn.Module:
    """The MoE block of a layer."""
    return getattr(naive.layers_of(model)[layer], naive.BLOCK.get(family, "mlp"))


def matrices(model: PreTrainedModel, family: str, layer: int) -> list[list[Tensor]]:
    """Of every expert: gate (where there is one), up and down."""
    experts = block_of(model, family, layer).experts
    return [naive.expert(family, model.config, experts, e).matrices for e in range(len(experts.down_proj))]


def inner(family: str, config: Any, experts: nn.Module, e: int, x: Tensor) -> Tensor:
    """What expert `e` multiplies its down projection with."""
    *before, _ = naive.expert(family, config, experts, e).matrices
    if family == "nemotron_h":
        return torch.clamp(before[0] @ x, min=0) ** 2
    gate, up = (matrix @ x for matrix in before)
    if family == "gpt_oss":
        gate, up = gate + experts.gate_up_proj_bias[e, 0::2], up + experts.gate_up_proj_bias[e, 1::2]
        gate = torch.clamp(gate, max=config.swiglu_limit)
        up = torch.clamp(up, -config.swiglu_limit, config.swiglu_limit)
        return (up + 1) * gate / (1 + torch.exp(-config.swiglu_alpha * gate))
    return gate / (1 + torch.exp(-gate)) * up


def routing(model: PreTrainedModel, family: str, layer: int, x: Tensor) -> tuple[naive.Routing, Tensor]:
    """A token's choice, and the logits it is made from."""
    block = block_of(model, family, layer)
    router = block.get_submodule(naive.ROUTER.get(family, "gate"))
    named = [*block.named_buffers(), *block.named_parameters()]
    bias = sum(b.reshape(-1) for n, b in named if n.endswith(("e_score_correction_bias", "expert_bias")))
    logits = router.weight @ x + (router.bias if family == "gpt_oss" else 0)
    return naive.ROUTE[family](model.config, logits, bias), logits


@torch.no_grad()
def entering(
    model: PreTrainedModel, family: str, ids: Tensor, mask: Tensor | None = None
) -> dict[int, tuple[Tensor, float]]:
    """Layer -> the real tokens that enter its MoE block, and their mean squared length behind the layer."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    model.double().set_experts_implementation("eager")
    real, found = mask.reshape(-1), {}
    for layer, seen in naive._captured(model, family, ids, mask).items():
        found[layer] = (seen["entering"][real], float(seen["leaving"][real].square().sum() / real.sum()))
    return found


@torch.no_grad()
def rows(model: PreTrainedModel, family: str, ids: Tensor, mask: Tensor | None = None) -> dict[int, list[Rows]]:
    """Layer -> what each of its experts sees of the real tokens. The model is left in float64."""
    found = {}
    for layer, (tokens, _) in entering(model, family, ids, mask).items():
        experts = block_of(model, family, layer).experts
        found[layer] = [Rows() for _ in experts.down_proj]
        for x in tokens:
            choice, _ = routing(model, family, layer, x)
            for e, gate in zip(choice.ids, choice.gates, strict=True):
                seen = gate * x if family == "llama4_text" else x
                found[layer][e].inputs.append(seen)
                found[layer][e].inner.append(inner(family, model.config, experts, e, seen))
                found[layer][e].gates.append(float(gate))
    return found
