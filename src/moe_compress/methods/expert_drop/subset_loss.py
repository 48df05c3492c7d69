"""What a layer would add with any set of its experts kept, from an output sample: token by token or step by step.

Without the experts outside a set, a token's routed output is sum_e gate_e f_e(x), so its squared distance to the
target is a quadratic form in the inner products that the output sample holds: no expert is run again. All in float64.

T tokens, E experts, K experts per token, M the experts a token ranks highest, R (token, kept set) pairs. A gate is
`scale * strength / total`, where only the total depends on who was dropped. So a token and a kept set are three
numbers: cross = sum strength <f, target> and square = |sum strength f|^2 over the experts used, and total.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calibration.output_sample import OutputSample

# Numbers in a table of (token, kept set) pairs by experts at a time.
CHUNK = 2**21
TOKENS_AT_ONCE = 256
# Where tokens may come to more choices than this, or rank more experts, kept sets are evaluated one by one.
MOST_CHOICES, MOST_REACHED = 1024, 16


@dataclass(frozen=True, slots=True)
class Sums:
    """What R (token, kept set) pairs come to.

    values_3R: cross, square and total; unknown_R: whether an expert is used whose output is not known; read_RE: the
    experts without which the choice would be another.
    """

    values_3R: Tensor
    unknown_R: Tensor
    read_RE: Tensor


@dataclass(frozen=True, slots=True)
class ChoiceTable:
    """What tokens would add with each of C choices of experts, and which choice a kept set leads to.

    values_3TC: cross, square and total; code_TE: 2^p for the expert that a token ranks at place p, so that the codes of
    a kept set add up to a number of bits; number_B: the choice for every such number.
    """

    values_3TC: Tensor
    code_TE: Tensor
    number_B: Tensor


@functools.cache
def _bits(reach: int) -> Tensor:
    """The bits of all numbers below 2^reach, bool [B, reach]."""
    return (torch.arange(2**reach).unsqueeze(1) >> torch.arange(reach)) % 2 == 1


def _first_bits(reach: int, places_CK: Tensor) -> Tensor:
    """For every number below 2^reach: which of the choices its K lowest set bits are, [B]."""
    bits_BP, top_k = _bits(reach), places_CK.shape[1]
    first_BP = bits_BP & (bits_BP.cumsum(1) <= top_k)
    powers_P = 2 ** torch.arange(reach)
    number_B = torch.zeros(2**reach, dtype=torch.long)
    number_B[powers_P[places_CK].sum(1)] = torch.arange(len(places_CK))
    return number_B[(first_BP * powers_P).sum(1)]


class SubsetLoss:
    """An output sample made ready: strengths [T, E], each expert's place in a token's list [T, E] (M: not in it)."""

    def __init__(self, sample: OutputSample, number: int | None = None) -> None:
        if sample.routing is None:
            where = "this layer" if number is None else f"layer {number}"
            raise ValueError(
                f"{where}: its router follows no rule that is known here, so what it would do without some of its "
                "experts cannot be told."
            )
        self.routing = sample.routing
        self.logits_TE = sample.logits_TE.double()
        tokens, self.experts = self.logits_TE.shape
        shifted_TE = self.logits_TE - self.logits_TE.amax(1, keepdim=True)
        self.strength_TE = self.logits_TE.sigmoid() if self.routing.scores == "sigmoid" else shifted_TE.exp()
        most = sample.ids_TM.shape[1]
        self.place_TE = torch.full((tokens, self.experts), most)
        self.place_TE.scatter_(1, sample.ids_TM, torch.arange(most).expand(tokens, -1))
        self.gram_TNN = sample.gram_TNN.double()
        self.target = self.gram_TNN[:, most, most].sum()
        self.all_tokens = torch.arange(tokens)

    @property
    def shares_total(self) -> bool:
        """Whether an expert's gate depends on experts that are not used: a softmax that is not renormalised."""
        return self.routing.scores == "softmax" and not self.routing.renormalised

    def relative(self, loss: Tensor) -> Tensor:
        """Squared distances as |target - output| / |target|."""
        return (loss.clamp_min(0) / self.target.clamp_min(torch.finfo(loss.dtype).tiny)).sqrt()

    def sums(self, token_R: Tensor, alive_RE: Tensor) -> Sums:
        """What tokens would add with the given experts."""
        strength_RE = self.strength_TE[token_R]
        choice_RE = self._choice(strength_RE, alive_RE)
        best = choice_RE.topk(self.routing.top_k, dim=1)
        found_RK = best.values.isfinite()
        strength_RK = strength_RE.gather(1, best.indices) * found_RK
        place_RK = self.place_TE[token_R].gather(1, best.indices)
        target = self.gram_TNN.shape[1] - 1
        known_RK = strength_RK * (place_RK < target)
        row_RK = (token_R.unsqueeze(1) * (target + 1) + place_RK) * (target + 1)
        flat = self.gram_TNN.view(-1)
        cross_R = (known_RK * flat[row_RK + target]).sum(1)
        gram_RKK = flat[row_RK.unsqueeze(2) + place_RK.unsqueeze(1)]
        square_R = ((gram_RKK @ known_RK.unsqueeze(2)).squeeze(2) * known_RK).sum(1)
        total_R = (strength_RE * alive_RE).sum(1) if self.shares_total else strength_RK.sum(1)
        if not self.routing.renormalised and not self.shares_total:
            total_R = torch.ones_like(total_R)
        unknown_R = (found_RK & (place_RK == target)).any(1)
        values_3R = torch.stack([cross_R, square_R, total_R])
        return Sums(values_3R, unknown_R, self.read(choice_RE, best.indices, found_RK))

    def _choice(self, strength_RE: Tensor, alive_RE: Tensor) -> Tensor:
        """What experts are selected by; strengths are in the order of the scores unless a bias is added to these."""
        if not self.routing.order_is_fixed:
            strength_RE = strength_RE / (strength_RE * alive_RE).sum(1, keepdim=True)
        return self.routing.eligible(strength_RE, alive_RE)

    def read(self, choice_RE: Tensor, index_RK: Tensor, found_RK: Tensor) -> Tensor:
        """Experts without which the choice would be another: those chosen, and the best that a group is judged by."""
        read_RE = torch.zeros_like(choice_RE, dtype=torch.bool).scatter_(1, index_RK, found_RK)
        if self.routing.groups > 1:
            choice_RGM = choice_RE.unflatten(1, (self.routing.groups, -1))
            best = choice_RGM.topk(min(self.routing.group_best, choice_RGM.shape[2]), dim=2)
            judges_RGM = torch.zeros_like(choice_RGM, dtype=torch.bool)
            read_RE |= judges_RGM.scatter_(2, best.indices, best.values.isfinite()).flatten(1)
        return read_RE

    def loss(self, values: Tensor) -> Tensor:
        """|target - output|^2 - |target|^2 from cross, square and total, [3, ...]."""
        cross, square, total = values
        share = self.routing.scale / total.clamp_min(torch.finfo(total.dtype).tiny)
        return share * (share * square - 2 * cross)

    def best_of(self, alive_SE: Tensor, bound: float) -> int:
        """Which kept set has the least loss, if that is at most `bound`.

        A loss only grows with every token, so a set is given up as soon as it is beyond the bound; the tokens
        with the most to lose come first.
        """
        target_T = self.gram_TNN[:, -1, -1]
        loss_S, left_S = torch.zeros(len(alive_SE), dtype=torch.float64), torch.arange(len(alive_SE))
        for token_T in target_T.argsort(descending=True, stable=True).split(TOKENS_AT_ONCE):
            chosen = self._choices(token_T, int((~alive_SE[0]).sum()))
            for part_S in left_S.split(max(1, CHUNK // (len(token_T) * self.experts))):
                part_SE = alive_SE[part_S]
                if chosen is None:
                    sums = self.sums(token_T.repeat(len(part_S)), part_SE.repeat_interleave(len(token_T), 0))
                    found_S = self.loss(sums.values_3R).view(len(part_S), -1).sum(1)
                else:
                    found_S = self._looked_up(chosen, token_T, part_SE)
                loss_S[part_S] += found_S + target_T[token_T].sum()
            left_S = left_S[loss_S[left_S] <= bound]
        return int(left_S[loss_S[left_S].argmin()])

    def _choices(self, token_T: Tensor, dropped: int) -> ChoiceTable | None:
        """All that tokens may come to choose once `dropped` experts are gone; None where a list of them is no help.

        A token then uses K of the K + dropped experts that it ranks highest. There are fewer such choices than kept
        sets, and each is evaluated once.
        """
        top_k, reach = self.routing.top_k, self.routing.top_k + dropped
        fixed = self.routing.order_is_fixed and self.routing.groups == 1
        if not fixed or reach > MOST_REACHED or math.comb(reach, top_k) > MOST_CHOICES:
            return None
        strength_TE = self.strength_TE[token_T]
        choice_TE = self.routing.eligible(strength_TE, torch.ones_like(strength_TE, dtype=torch.bool))
        order_TP = choice_TE.argsort(dim=1, descending=True, stable=True)[:, :reach]
        places_CK = torch.tensor(list(itertools.combinations(range(reach), top_k)))
        alive_TCE = torch.zeros(len(token_T), len(places_CK), self.experts, dtype=torch.bool)
        alive_TCE.scatter_(2, order_TP[:, places_CK.flatten()].view(len(token_T), *places_CK.shape), True)
        values_3R = self.sums(token_T.repeat_interleave(len(places_CK)), alive_TCE.flatten(0, 1)).values_3R
        code_TE = torch.zeros(strength_TE.shape).scatter_(1, order_TP, 2.0 ** torch.arange(reach).expand_as(order_TP))
        return ChoiceTable(values_3R.view(3, len(token_T), -1), code_TE, _first_bits(reach, places_CK))

    def _looked_up(self, chosen: ChoiceTable, token_T: Tensor, alive_SE: Tensor) -> Tensor:
        """Summed losses of kept sets over the tokens, less their targets, [S]."""
        index_TS = chosen.number_B[(chosen.code_TE @ alive_SE.T.float()).long()]
        values_3TS = torch.stack([table_TC.gather(1, index_TS) for table_TC in chosen.values_3TC])
        if self.shares_total:
            values_3TS[2] = self.strength_TE[token_T] @ alive_SE.T.double()
        return self.loss(values_3TS).sum(0)

    def losses(self, alive_SE: Tensor) -> tuple[Tensor, Tensor]:
        """|target - output|^2 of kept sets, and their shares of exhausted tokens, both [S]."""
        found = [torch.zeros(2, 0, dtype=torch.float64)]
        for part_SE in alive_SE.split(max(1, CHUNK // self.strength_TE.numel())):
            loss_S, unknown_S = self.target.expand(len(part_SE)), torch.zeros(len(part_SE), dtype=torch.float64)
            for token_T in self.all_tokens.split(max(1, CHUNK // part_SE.numel())):
                sums = self.sums(token_T.repeat(len(part_SE)), part_SE.repeat_interleave(len(token_T), 0))
                loss_S = loss_S + self.loss(sums.values_3R).view(len(part_SE), -1).sum(1)
                unknown_S = unknown_S + sums.unknown_R.view(len(part_SE), -1).sum(1)
            found.append(torch.stack([loss_S, unknown_S / len(self.all_tokens)]))
        loss_S, unknown_S = torch.cat(found, dim=1)
        return loss_S, unknown_S


class SubsetSearch:
    """A kept set, and for every token what it adds now (last column) and without each single expert (the others)."""

    def __init__(self, layer: SubsetLoss) -> None:
        self.layer = layer
        tokens, experts = layer.strength_TE.shape
        self.alive_E = torch.ones(experts, dtype=torch.bool)
        self.values_3TE = torch.zeros(3, tokens, experts + 1, dtype=torch.float64)
        self.read_TE = torch.zeros(tokens, experts, dtype=torch.bool)
        self.loss_E = torch.zeros(experts + 1, dtype=torch.float64)
        self._refresh(layer.all_tokens)

    def losses(self) -> Tensor:
        """|target - output|^2 without each single expert, and (last) with all that are alive, [E + 1].

        Columns of experts that are dropped already mean nothing.
        """
        loss_E = self.layer.loss(self.values_3TE).sum(0) if self.layer.shares_total else self.loss_E
        return loss_E + self.layer.target

    def remove(self, expert: int) -> None:
        """Drop an expert; only tokens to which it mattered, now or as a replacement, are evaluated anew."""
        self.alive_E[expert] = False
        self._shift_totals(-self.layer.strength_TE[:, expert])
        fixed = self.layer.routing.order_is_fixed
        self._refresh(self.read_TE[:, expert].nonzero().flatten() if fixed else self.layer.all_tokens)

    def with_expert(self, expert: int) -> SubsetSearch:
        """A search whose kept set has one expert more."""
        other = copy.copy(self)
        for name in ("alive_E", "values_3TE", "read_TE", "loss_E"):
            setattr(other, name, getattr(self, name).clone())
        other.alive_E[expert] = True
        other._shift_totals(self.layer.strength_TE[:, expert])
        other._refresh(other._reached_by(expert))
        return other

    def _reached_by(self, expert: int) -> Tensor:
        """Tokens that would use an expert just added, or would if they lost one of theirs."""
        layer = self.layer
        if not layer.routing.order_is_fixed:
            return layer.all_tokens
        choice_TE = layer.routing.eligible(layer.strength_TE, self.alive_E)
        next_TK = choice_TE.topk(min(layer.routing.top_k + 1, layer.experts), dim=1)
        read_TE = layer.read(choice_TE, next_TK.indices, next_TK.values.isfinite())
        return read_TE[:, expert].nonzero().flatten()

    def _shift_totals(self, by_T: Tensor) -> None:
        if self.layer.shares_total:
            self.values_3TE[2] += by_T.unsqueeze(1)

    def _refresh(self, token_T: Tensor) -> None:
        """Evaluate tokens anew: as they are, and without each expert that matters to them."""
        for token_S in token_T.split(max(1, CHUNK // (self.layer.routing.top_k * self.layer.experts))):
            self.loss_E -= self.layer.loss(self.values_3TE[:, token_S]).sum(0)
            self.values_3TE[:, token_S], self.read_TE[token_S] = self._evaluated(token_S)
            self.loss_E += self.layer.loss(self.values_3TE[:, token_S]).sum(0)

    def _evaluated(self, token_S: Tensor) -> tuple[Tensor, Tensor]:
        layer, alive_SE = self.layer, self.alive_E.expand(len(token_S), -1)
        now = layer.sums(token_S, alive_SE)
        row_R, out_R = now.read_RE.nonzero(as_tuple=True)
        without = layer.sums(token_S[row_R], alive_SE[row_R].scatter_(1, out_R.unsqueeze(1), False))
        values_3SE = now.values_3R.unsqueeze(2).repeat(1, 1, layer.experts + 1)
        if layer.shares_total:
            values_3SE[2, :, :-1] -= layer.strength_TE[token_S]
        values_3SE[:, row_R, out_R] = without.values_3R
        pair_P, expert_P = without.read_RE.nonzero(as_tuple=True)
        read_SE = now.read_RE.clone()
        read_SE[row_R[pair_P], expert_P] = True
        return values_3SE, read_SE
