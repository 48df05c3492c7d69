"""An output sample: what every expert of a layer returns on a sample of tokens, and what the router made of it.

Sums over routed tokens (expert_statistics.py) cannot say what the layer would do without an expert; this can. T sampled
tokens, K experts per token, E experts, M the experts a token ranks highest, N = M + 1, D model width, F inner
width, S the first few tokens of the sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moe_compress.engine.observer import BatchInfo, evenly_T
from moe_compress.models import hf
from moe_compress.models.families import Family, experts_per_token, groups_of
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import MoEView, learned_view, router_logits
from moe_compress.models.router_rule import RouterRule, fit_router_rule, selection_bias

SAMPLE_TOKENS = 4096
INNER_TOKENS = 64
# Up to this many experts every expert is ranked for every token; else this many, or RANKED_PER_CHOICE * K.
ALL_RANKED = 16
RANKED_PER_CHOICE = 4
# Numbers in one table of all experts' outputs (or inner activations) at a time: few enough to stay in the cache.
CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class OutputSample:
    """One layer's experts on a sample of tokens, evenly spaced over the text.

    logits_TE: raw router logits; index_TK, gate_TK: the experts and gates applied; component_T: domain and fold;
    ids_TM: each token's experts by selection score, best first (those applied before all others);
    gram_TNN: inner products of [un-gated outputs of the experts ids_TM, target], where the target is what the
    routed experts really added, or what they should; mean_ED: mean un-gated output; cosine_EE: mean cosine
    between the outputs of two experts; inner_EFS: inputs of the down projections, neurons as rows;
    routing: the router's rule, None if it is of no known kind.
    """

    logits_TE: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    component_T: Tensor
    ids_TM: Tensor
    gram_TNN: Tensor
    mean_ED: Tensor
    cosine_EE: Tensor
    inner_EFS: Tensor
    routing: RouterRule | None

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, to be saved."""
        found = {name: getattr(self, name).cpu().contiguous() for name in TENSORS}
        rule = self.routing.tensors() if self.routing is not None else {}
        return found | {f"routing_{name}": tensor for name, tensor in rule.items()}

    def weighted(self, weight_C: Tensor) -> OutputSample:
        """The output sample with every token weighing as its component does, and without those that weigh nothing.

        Losses and logits follow the weights; the means over experts' outputs stay those of all tokens.
        """
        weight_T = weight_C[self.component_T]
        kept_T = weight_T > 0
        if bool((weight_T == 1).all()):
            return self
        tables = ("logits_TE", "index_TK", "gate_TK", "component_T", "ids_TM", "gram_TNN")
        left = {name: getattr(self, name)[kept_T] for name in tables}
        left["gram_TNN"] = left["gram_TNN"] * weight_T[kept_T].to(left["gram_TNN"])[:, None, None]
        return replace(self, **left)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> OutputSample:
        """The output sample that `tensors` gave."""
        rule, bias_E = tensors.get("routing_rule"), tensors.get("routing_bias")
        routing = None if rule is None else RouterRule.from_tensors(rule, bias_E)
        return cls(**{name: tensors[name] for name in TENSORS}, routing=routing)


TENSORS = tuple(field.name for field in fields(OutputSample) if field.name != "routing")


class OutputSampler:
    """Takes an output sample of every layer with experts; a layer without experts gives nothing.

    Of the real tokens it takes P, evenly spaced and whatever the batches. When a layer is done, `routed` holds what its
    routed experts added to the taken tokens [P, D], until the next one is done; `targets` [P, D], if set before a
    layer runs, is the target instead of that. Where the gate scales the experts' input (Llama-4) there is no output
    before the gate: outputs are those of the unscaled input, and the routing is None. `light`: only `routed` is
    wanted, no other expert is run.
    """

    def __init__(
        self, family: Family, config: Any, real_tokens: int, sample: int = SAMPLE_TOKENS, *, light: bool = False
    ) -> None:
        self.family = family
        self.config = config
        self.real_tokens = real_tokens
        self.sample = min(sample, real_tokens)
        self.view: MoEView | None = None
        self.light = light
        self.targets: Tensor | None = None
        self.routed = torch.empty(0)

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the layer's experts and router; ValueError where experts went but the router stayed whole."""
        self.index = index
        self.view = learned_view(layer, self.family)
        if self.view is None:
            return
        if self.view.router_rows != self.view.num_experts:
            raise ValueError(
                f"layer {index}: its router leads several ways to one expert or to none, which no sample describes."
            )
        self.top_k = self.view.top_k or experts_per_token(self.config)
        self.rule = self._rule(self.view)
        self.passed = self.taken = 0
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.sums: dict[str, Tensor] = {}
        hf.tap(self.view.block, self.view.experts, self._rows)
        self.hook = self.view.router.register_forward_hook(self._router)

    def _rule(self, view: MoEView) -> RouterRule:
        """All of the router's rule that does not have to be found out."""
        groups, groups_used = groups_of(self.config)
        return RouterRule(
            top_k=self.top_k,
            scores=self.family.router_scores,
            renormalised=False,
            groups=groups,
            groups_used=groups_used,
            group_best=self.family.min_per_group,
            bias_E=selection_bias(view),
        )

    def begin(self, batch: BatchInfo) -> None:
        """Choose the batch's tokens."""
        if self.view is None:
            return
        real_T = batch.real_T.nonzero().flatten()
        self.token_T = real_T[evenly_T(self.passed, len(real_T), self.sample, self.real_tokens, real_T.device)]
        self.passed += len(real_T)
        self.parts["component_T"].append(batch.component_T[self.token_T])

    def _router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.view is not None
        logits_TE = router_logits(output, self.view.num_experts, self.family)
        self.parts["logits_TE"].append(logits_TE[self.token_T].float())

    def _rows(self, rows: RoutedRows) -> None:
        assert self.view is not None
        if not len(self.token_T):
            return
        expert_TK, gate_TK, input_TD = self._by_token(rows)
        routed_TD = rows.routed_TD[self.token_T].float()
        self.parts["index_TK"].append(expert_TK)
        self.parts["gate_TK"].append(gate_TK)
        self.parts["routed_TD"].append(routed_TD)
        if self.light:
            self.taken += len(self.token_T)
            return
        number = slice(self.taken, self.taken + len(self.token_T))
        target_TD = routed_TD if self.targets is None else self.targets[number].to(routed_TD)
        ids_TM = self._ranked(self.parts["logits_TE"][-1], expert_TK, gate_TK)
        self.parts["ids_TM"].append(ids_TM)
        experts = self.view.num_experts
        width = max(input_TD.shape[-1], 2 * rows.inner_RF.shape[-1])
        step = max(1, CHUNK // (experts * width))
        for start in range(0, len(ids_TM), step):
            part = slice(start, start + step)
            self._run_all(input_TD[part], target_TD[part], ids_TM[part], INNER_TOKENS - self.taken - start)
        self.taken += len(ids_TM)

    def _by_token(self, rows: RoutedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Experts and gates [T, K] of the chosen tokens, and the input of their experts [T, D].

        A slot that went to nobody has gate zero.
        """
        count = len(self.token_T)
        place_B = torch.full((len(rows.routed_TD),), -1, device=rows.token_R.device)
        place_B[self.token_T] = torch.arange(count, device=place_B.device)
        place_R = place_B[rows.token_R]
        row_R = (place_R >= 0).nonzero().flatten()
        place_R, order = place_R[row_R].sort(stable=True)
        row_R = row_R[order]
        used_T = torch.bincount(place_R, minlength=count)
        assert bool((used_T > 0).all()), f"layer {self.index}: a token went to no expert at all"
        first_T = used_T.cumsum(0) - used_T
        slot_R = torch.arange(len(place_R), device=place_R.device) - first_T[place_R]
        expert_TK = rows.expert_R.new_zeros(count, self.top_k)
        gate_TK = rows.gate_R.new_zeros(count, self.top_k)
        expert_TK[place_R, slot_R], gate_TK[place_R, slot_R] = rows.expert_R[row_R], rows.gate_R[row_R]
        input_TD = rows.input_RD[row_R[first_T]]
        if self.view is not None and hf.gate_on_input(self.view.experts):
            input_TD = input_TD / rows.gate_R[row_R[first_T]].unsqueeze(-1)
        return expert_TK, gate_TK, input_TD

    def _ranked(self, logits_TE: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The M experts that each token ranks highest, [T, M]: those it uses, then by selection score."""
        experts = logits_TE.shape[-1]
        alive_E = torch.ones(experts, dtype=torch.bool, device=logits_TE.device)
        rank_TE = self.rule.score(logits_TE, alive_E)
        rank_TE = rank_TE if self.rule.bias_E is None else rank_TE + self.rule.bias_E.to(rank_TE)
        used_TE = torch.zeros_like(rank_TE).scatter_reduce_(1, expert_TK, (gate_TK != 0).to(rank_TE), "amax")
        most = experts if experts <= ALL_RANKED else min(experts, max(ALL_RANKED, RANKED_PER_CHOICE * self.top_k))
        by_score_TE = rank_TE.argsort(dim=1, descending=True, stable=True)
        used_first = used_TE.gather(1, by_score_TE).argsort(dim=1, descending=True, stable=True)
        return by_score_TE.gather(1, used_first)[:, :most]

    def _run_all(self, input_TD: Tensor, target_TD: Tensor, ids_TM: Tensor, inner_left: int) -> None:
        """Run every expert on some of the tokens, and keep what the output sample needs of it."""
        assert self.view is not None
        found = hf.all_experts(self.view.experts, input_TD)
        output_ETD = found.output_ETD.float()
        token_T = torch.arange(len(ids_TM), device=ids_TM.device)
        ranked_TMD = output_ETD[ids_TM, token_T[:, None]]
        rows_TND = torch.cat([ranked_TMD, target_TD[:, None]], dim=1).double()
        self.parts["gram_TNN"].append((rows_TND @ rows_TND.transpose(1, 2)).float())
        self._add("mean_ED", output_ETD.double().sum(1))
        turned = normalize(output_ETD, dim=-1).flatten(1)
        self._add("cosine_EE", (turned @ turned.T).double())
        if inner_left > 0:
            self.parts["inner_EFS"].append(found.inner_ETF[:, :inner_left].float().transpose(1, 2))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """The layer's output sample as tensors on the CPU."""
        if self.view is None:
            return {}
        hf.untap(self.view.block, self.view.experts, self._rows)
        self.hook.remove()
        heard = self.taken == self.sample
        assert heard, f"layer {self.index}: {self.taken} tokens were heard of, not {self.sample}"
        self.routed = torch.cat(self.parts.pop("routed_TD"))
        if self.light:
            return {}
        inner_EFS = torch.cat(self.parts.pop("inner_EFS"), dim=-1)
        joined = {name: torch.cat(parts) for name, parts in self.parts.items()}
        means = {name: (total / self.taken).float() for name, total in self.sums.items()}
        routing = self._identified(joined["logits_TE"], joined["index_TK"], joined["gate_TK"])
        joined["gate_TK"] = joined["gate_TK"].float()
        self.parts, self.sums = {}, {}
        return OutputSample(**joined, **means, inner_EFS=inner_EFS, routing=routing).tensors()

    def _identified(self, logits_TE: Tensor, index_TK: Tensor, gate_TK: Tensor) -> RouterRule | None:
        assert self.view is not None
        if hf.gate_on_input(self.view.experts):
            return None
        rule = self.rule
        return fit_router_rule(
            logits_TE,
            index_TK,
            gate_TK,
            top_k=rule.top_k,
            scores=rule.scores,
            groups=rule.groups,
            groups_used=rule.groups_used,
            group_best=rule.group_best,
            bias_E=rule.bias_E,
        )
