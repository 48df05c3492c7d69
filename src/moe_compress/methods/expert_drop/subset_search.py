"""Which experts to keep so that the routed output of a layer changes least (NAEE, arXiv 2402.14800).

T tokens, E experts, K experts per token, M the experts a token ranks highest, R some of the tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calibration.output_sample import OutputSample
from moe_compress.methods.expert_drop.subset_loss import CHUNK, SubsetLoss, SubsetSearch
from moe_compress.methods.score_registry import score
from moe_compress.models.router_rule import RouterRule
from moe_compress.models.shape import MoEShape

SWAP_PASSES = 4
# A swap that gains less than this share of the loss is rounding.
LEAST_GAIN = 1e-9


@dataclass(frozen=True, slots=True)
class Choice:
    """A kept set, |target - output| / |target| over all tokens, and the share of tokens that use unknown experts.

    An expert is unknown to a token that ranks it below the M of the sample: its gate counts, its output does not.
    """

    kept: tuple[int, ...]
    loss: float
    exhausted: float


def subset_losses(sample: OutputSample, subsets: Iterable[Sequence[int]]) -> Tensor:
    """|target - output| / |target| over all tokens for every kept set, [n]: exact where no token is exhausted."""
    layer = SubsetLoss(sample)
    return layer.relative(layer.losses(_masks(subsets, layer.experts))[0])


def elimination_order(sample: OutputSample, shape: MoEShape) -> list[tuple[tuple[int, ...], float]]:
    """Greedy elimination down to `shape.floor`: the experts that go together, one of each group, and the loss then."""
    search = SubsetSearch(SubsetLoss(sample, shape.layer))
    path = []
    while int(search.alive_E.sum()) > shape.floor:
        gone = _eliminate(search, shape)
        path.append((gone, float(search.layer.relative(search.losses()[-1]))))
    return path


@score("remove_one", needs="outputs")
def remove_one(sample: OutputSample, shape: MoEShape) -> Tensor:
    """How much the layer's output changes when an expert alone is removed and its slots are filled anew, [E].

    Mean squared change over the tokens that use it, times their share of all (ModelOpt's Puzzletron).
    """
    layer = SubsetLoss(sample, shape.layer)
    changed_E = torch.zeros(layer.experts, dtype=torch.float64)
    top_k, most = layer.routing.top_k, sample.ids_TM.shape[1]
    for token_R in layer.all_tokens.split(max(1, CHUNK // (top_k * layer.experts))):
        alive_RE = torch.ones(len(token_R), layer.experts, dtype=torch.bool)
        index_RK, gate_RK = layer.routing.route(layer.logits_TE[token_R], alive_RE)
        without_RKE = alive_RE.unsqueeze(1).repeat(1, top_k, 1).scatter_(2, index_RK.unsqueeze(2), False)
        again_RKK, gate_RKK = layer.routing.route(
            layer.logits_TE[token_R].unsqueeze(1).expand_as(without_RKE), without_RKE
        )
        place_RE = layer.place_TE[token_R]
        before_RM = torch.zeros(len(token_R), most + 1, dtype=torch.float64)
        before_RM.scatter_(1, place_RE.gather(1, index_RK), gate_RK)
        after_RKM = torch.zeros(len(token_R), top_k, most + 1, dtype=torch.float64)
        place_RKE = place_RE.unsqueeze(1).expand(-1, top_k, -1)
        after_RKM.scatter_(2, place_RKE.gather(2, again_RKK), gate_RKK)
        change_RKM = (before_RM.unsqueeze(1) - after_RKM)[..., :most]
        squared_RK = ((change_RKM @ layer.gram_TNN[token_R, :most, :most]) * change_RKM).sum(-1)
        changed_E.index_add_(0, index_RK[gate_RK > 0], squared_RK[gate_RK > 0])
    return changed_E / len(layer.all_tokens)


@score("ranked_choice", needs="outputs")
def ranked_choice(sample: OutputSample, _shape: MoEShape | None = None) -> Tensor:
    """Place in which experts are voted out, [E], the last survivor's the highest (ModelOpt's ranked-choice voting).

    The expert with the fewest tokens that choose it goes first, of equals the one of lowest number; each of its
    tokens then votes for the next expert it would choose.
    """
    routing = sample.routing or RouterRule(top_k=sample.index_TK.shape[1], scores="softmax", renormalised=True)
    alive_E = torch.ones(sample.logits_TE.shape[1], dtype=torch.bool)
    score_TE = routing.score(sample.logits_TE.double(), alive_E)

    def votes(score_RE: Tensor) -> Tensor:
        best = routing.eligible(score_RE, alive_E).topk(routing.top_k, dim=1)
        return torch.zeros_like(score_RE, dtype=torch.bool).scatter_(1, best.indices, best.values.isfinite())

    vote_TE = votes(score_TE)
    place_E = torch.zeros(len(alive_E), dtype=torch.float64)
    for place in range(len(alive_E)):
        count_E = vote_TE.sum(0).masked_fill(~alive_E, len(vote_TE) + 1)
        out = int(count_E.argmin())
        alive_E[out], place_E[out] = False, place
        token_R = vote_TE[:, out].nonzero().flatten()
        vote_TE[token_R] = votes(score_TE[token_R])
    return place_E


@score("naee", needs="outputs", paper="NAEE, arXiv 2402.14800", chooses_sets=True)
def best_subset(sample: OutputSample, shape: MoEShape, keep: int, *, exact_up_to: int = 16) -> Choice:
    """The set of `keep` experts with the least loss, equally many in every router group.

    Greedy elimination, then swaps of a kept for a dropped expert as long as they help; with at most `exact_up_to`
    experts, instead of swaps, all sets that may be better are tried, so that none is. The loss of every set that is
    reached is exact, and no swap is taken that does not lower it. The comparison of steps not taken is exact as well,
    with two exceptions. Under a softmax with a selection bias, all of them neglect that the rank of an expert may
    change for tokens that do not use the one removed. Under groups, swaps neglect that a token's groups may change so
    that the new expert comes into reach.
    """
    shape.require(keep)
    layer = SubsetLoss(sample, shape.layer)
    search = SubsetSearch(layer)
    while int(search.alive_E.sum()) > keep:
        _eliminate(search, shape)
    exact = layer.experts <= exact_up_to
    alive_E = search.alive_E if exact else _swap(search, shape).alive_E
    loss, exhausted = layer.losses(alive_E[None])
    if exact:
        alive_SE = _masks(_balanced(shape, keep), layer.experts)
        alive_E = alive_SE[layer.best_of(alive_SE, float(loss) + LEAST_GAIN * float(layer.target))]
        loss, exhausted = layer.losses(alive_E[None])
    kept = tuple(alive_E.nonzero().flatten().tolist())
    return Choice(kept, float(layer.relative(loss)), float(exhausted))


def _masks(subsets: Iterable[Sequence[int]], experts: int) -> Tensor:
    ids = [torch.tensor(list(subset), dtype=torch.long) for subset in subsets]
    alive_SE = torch.zeros(len(ids), experts, dtype=torch.bool)
    for alive_E, kept in zip(alive_SE, ids, strict=True):
        alive_E[kept] = True
    return alive_SE


def _members(shape: MoEShape) -> list[range]:
    """The experts of each router group."""
    size = shape.num_experts // shape.groups
    return [range(g * size, (g + 1) * size) for g in range(shape.groups)]


def _balanced(shape: MoEShape, keep: int) -> Iterator[tuple[int, ...]]:
    """All sets of `keep` experts with equally many in every group."""
    of_each = [itertools.combinations(members, keep // shape.groups) for members in _members(shape)]
    return (tuple(itertools.chain(*parts)) for parts in itertools.product(*of_each))


def _eliminate(search: SubsetSearch, shape: MoEShape) -> tuple[int, ...]:
    """Drop the expert of each group that is missed least, one group after the other."""
    gone = []
    for members in _members(shape):
        losses = search.losses()
        expert = min((e for e in members if search.alive_E[e]), key=lambda e: float(losses[e]))
        search.remove(expert)
        gone.append(expert)
    return tuple(gone)


def _swap(search: SubsetSearch, shape: MoEShape) -> SubsetSearch:
    """Take dropped experts in, each for the kept one of its group that is then missed least, while that helps."""
    loss = float(search.losses()[-1])
    for _ in range(SWAP_PASSES):
        before = loss
        for members in _members(shape):
            for expert in [e for e in members if not search.alive_E[e]]:
                trial = search.with_expert(expert)
                losses = trial.losses()
                out = min((e for e in members if search.alive_E[e]), key=lambda e: float(losses[e]))
                if losses[out] >= loss * (1 - LEAST_GAIN):
                    continue
                trial.remove(out)
                if (found := float(trial.losses()[-1])) < loss * (1 - LEAST_GAIN):
                    search, loss = trial, found
        if math.isclose(before, loss, rel_tol=LEAST_GAIN):
            break
    return search
