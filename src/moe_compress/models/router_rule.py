"""What a router would do without some of its experts, from its logits: no forward, and no family's rule guessed.

T tokens, E experts, K experts per token. A rule is found by fitting the gates that were really applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_compress.models.moe import MoEView

Scores = Literal["softmax", "sigmoid"]
# How well a rule must fit: relative error of every gate, and share of tokens whose experts it names.
GATE_TOLERANCE = 1e-3
AGREEMENT = 0.99


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterRule:
    """A router's rule: scores, selection by score plus bias within the best groups, gates from the scores.

    renormalised: the chosen experts' gates add up to `scale`; groups_used of groups: those whose `group_best`
    best experts (one or two) add up highest; bias_E: added for the selection only.
    """

    top_k: int
    scores: Scores
    renormalised: bool
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_best: int = 1
    bias_E: Tensor | None = None

    @property
    def order_is_fixed(self) -> bool:
        """Whether two experts keep their order whoever else is dropped: a softmax plus a bias does not."""
        return self.scores == "sigmoid" or self.bias_E is None

    def score(self, logits_TE: Tensor, alive: Tensor) -> Tensor:
        """The router's scores [T, E] without dropped experts, whose logits are minus infinity."""
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        logits_TE = logits_TE.masked_fill(~alive, -torch.inf)
        # Where nobody is left the softmax is 0 / 0.
        return logits_TE.sigmoid() if self.scores == "sigmoid" else logits_TE.softmax(-1).nan_to_num(0.0)

    def eligible(self, score_TE: Tensor, alive: Tensor) -> Tensor:
        """What experts are selected by [T, E]: score plus bias, minus infinity for those out of reach.

        Out of reach are dropped experts and those in groups that are not among the best. A group with fewer
        experts left than judge it counts those it has.
        """
        choice_TE = score_TE if self.bias_E is None else score_TE + self.bias_E.to(score_TE)
        choice_TE = choice_TE.masked_fill(~alive, -torch.inf)
        if self.groups == 1:
            return choice_TE
        choice_TGM = choice_TE.unflatten(-1, (self.groups, -1))
        best_TGB = choice_TGM.topk(min(self.group_best, choice_TGM.shape[-1]), dim=-1).values
        judged_TG = best_TGB.masked_fill(best_TGB.isinf(), 0.0).sum(-1)
        judged_TG = judged_TG.masked_fill(best_TGB[..., 0].isinf(), -torch.inf)
        out_TG = torch.ones_like(judged_TG, dtype=torch.bool)
        out_TG = out_TG.scatter(-1, judged_TG.topk(self.groups_used, dim=-1).indices, False)
        return choice_TGM.masked_fill(out_TG.unsqueeze(-1), -torch.inf).flatten(-2)

    def route(self, logits_TE: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their gates [T, K]; `alive` is [E] or, for every token its own, [T, E].

        Where a token reaches fewer than K experts, the gates of the missing ones are zero and their index is of no
        meaning.
        """
        score_TE = self.score(logits_TE, alive)
        best = self.eligible(score_TE, alive).topk(self.top_k, dim=-1)
        gate_TK = score_TE.gather(-1, best.indices).masked_fill(best.values.isinf(), 0.0)
        if self.renormalised:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(gate_TK.dtype).tiny)
        return best.indices, gate_TK * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """The rule as tensors: `rule`, float64 [7], and `bias` if there is one."""
        numbers = [self.top_k, self.scores == "sigmoid", self.renormalised, self.scale]
        numbers += [self.groups, self.groups_used, self.group_best]
        rule = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        return {"rule": rule} if self.bias_E is None else {"rule": rule, "bias": self.bias_E.cpu().contiguous()}

    @classmethod
    def from_tensors(cls, rule: Tensor, bias_E: Tensor | None) -> RouterRule:
        """The rule that `tensors` gave."""
        top_k, sigmoid, renormalised, scale, groups, groups_used, group_best = rule.tolist()
        return cls(
            top_k=int(top_k),
            scores="sigmoid" if sigmoid else "softmax",
            renormalised=bool(renormalised),
            scale=scale,
            groups=int(groups),
            groups_used=int(groups_used),
            group_best=int(group_best),
            bias_E=bias_E,
        )


def fit_router_rule(
    logits_TE: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    *,
    top_k: int,
    scores: Scores,
    groups: int = 1,
    groups_used: int = 1,
    group_best: int = 1,
    bias_E: Tensor | None = None,
) -> RouterRule | None:
    """The rule that gives the gates and the experts that were applied; None if there is none of this kind.

    Gates must be in the dtype in which they were applied: what its rounding makes unclear is not held against a
    rule.
    """
    alive_E = torch.ones(logits_TE.shape[-1], dtype=torch.bool, device=logits_TE.device)
    if index_TK.shape[-1] != top_k or not len(logits_TE) or int(index_TK.max()) >= len(alive_E):
        return None
    rule = RouterRule(
        top_k=top_k,
        scores=scores,
        renormalised=False,
        groups=groups,
        groups_used=groups_used,
        group_best=group_best,
        bias_E=bias_E,
    )
    score_TE = rule.score(logits_TE.double(), alive_E)
    applied_TK = score_TE.gather(-1, index_TK)
    fits = (_fit(applied_TK, gate_TK, False), _fit(applied_TK / applied_TK.sum(-1, keepdim=True), gate_TK, True))
    error, renormalised, scale = min(fits)
    tolerance = max(GATE_TOLERANCE, 2 * torch.finfo(gate_TK.dtype).eps)
    # Written so that an error that is no number is refused, too.
    if not error <= tolerance:
        return None
    rule = replace(rule, renormalised=renormalised, scale=scale)
    return rule if _agreement(rule, score_TE, index_TK, tolerance) >= AGREEMENT else None


def _fit(raw_TK: Tensor, gate_TK: Tensor, renormalised: bool) -> tuple[float, bool, float]:
    """Largest error of `scale * raw` relative to the gate (or to a hundredth of the token's largest), and scale."""
    gate_TK = gate_TK.double()
    seen_TK = (raw_TK > 0) & (gate_TK > 0)
    scale = float((gate_TK / raw_TK)[seen_TK].median()) if bool(seen_TK.any()) else 0.0
    size_TK = torch.maximum(gate_TK, 0.01 * gate_TK.amax(-1, keepdim=True))
    error = float(((gate_TK - scale * raw_TK).abs() / size_TK).max())
    return error, renormalised, scale


def _agreement(rule: RouterRule, score_TE: Tensor, index_TK: Tensor, tolerance: float) -> float:
    """Share of tokens whose experts the rule chooses, or others that are selected by as good a score."""
    alive_TE = torch.ones_like(score_TE, dtype=torch.bool)
    choice_TE = rule.eligible(score_TE, alive_TE)
    expected_TK = choice_TE.topk(rule.top_k, dim=-1)
    same_T = (expected_TK.indices.sort(-1).values == index_TK.sort(-1).values).all(-1)
    free_TE = replace(rule, groups=1).eligible(score_TE, alive_TE)
    chosen_TK = free_TE.gather(-1, index_TK).sort(-1, descending=True).values
    as_good_T = ((chosen_TK - expected_TK.values).abs() <= tolerance * expected_TK.values.abs()).all(-1)
    return float((same_T | as_good_T).double().mean())


def selection_bias(view: MoEView) -> Tensor | None:
    """What the block adds to its scores for the selection only, flat [E]; None if nothing, or if it is not clear.

    A tensor called just `bias` belongs to a linear map, and is in the logits already.
    """
    experts = view.num_experts
    found = [
        tensor.detach().reshape(-1)
        for name, tensor in routing_tensors(view)
        if "bias" in name and name != "bias" and tensor.numel() == tensor.shape[-1] == experts
    ]
    return found[0] if len(found) == 1 else None


def routing_tensors(view: MoEView) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the block itself and of the router and all that is in it, by their last names."""
    for module in (view.block, *view.router.modules()):
        for table in (module._parameters, module._buffers):
            yield from ((name, tensor) for name, tensor in table.items() if tensor is not None and tensor.dim())
