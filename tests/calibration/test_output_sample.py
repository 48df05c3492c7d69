"""Probes hold what the experts really return, and what is computed from them is what a really cut layer would do.

The references are slow and written from the definitions: one token, one expert, one kept set at a time, in float64.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import naive
import tiny
from moe_compress.calibration import output_sample as probe_module
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.engine import forward as fold_module
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.methods.expert_drop import subset_search
from moe_compress.methods.expert_drop.subset_loss import SubsetLoss, SubsetSearch
from moe_compress.methods.expert_drop.subset_search import best_subset, elimination_order, subset_losses
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling.edit_layer import keep_experts, skip_experts
from moe_compress.models.moe import moe_views
from moe_compress.models.router_rule import RouterRule
from moe_compress.models.shape import MoEShape, moe_shapes
from test_identity import windows_of
from test_routing import VARIANTS, Block, block_of, dense, made

CPU = torch.device("cpu")
IDS = tiny.token_ids(rows=4, length=12)
PADDED = torch.arange(12)[None] < torch.tensor([12, 7, 3, 10])[:, None]
SAMPLE = 20


# --- what a probe holds ---------------------------------------------------------------------------------------


def probed(checkpoint: Checkpoint, sample: int = SAMPLE, mask: Tensor = PADDED) -> dict[int, OutputSample]:
    """Layer -> the probe of a checkpoint on the test's text."""
    observer = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(mask.sum()), sample)
    seen, _ = forward_layers(StreamedLayers(checkpoint, CPU, torch.float32), windows_of(IDS, mask), [observer])
    return {index: OutputSample.from_tensors(parts[0]) for index, parts in enumerate(seen) if parts[0]}


@functools.cache
def sampled() -> list[int]:
    """Places, in the flat text, of the tokens that the probe takes."""
    real = PADDED.reshape(-1).nonzero().flatten().tolist()
    places = [real[n] for n in range(len(real)) if (n + 1) * SAMPLE // len(real) > n * SAMPLE // len(real)]
    assert len(places) == SAMPLE and len(real) == 32
    return places


def naive_probe(family: str) -> dict[int, dict[str, Tensor]]:
    """Layer -> what a probe should hold, from the stock model in float64 and its experts one at a time."""
    model = tiny.make(family).double()
    model.set_experts_implementation("eager")
    config, found = model.config, {}
    with torch.no_grad():
        captured = naive._captured(model, family, IDS, PADDED)
    for index, seen in captured.items():
        block = getattr(model.model.layers[index], naive.BLOCK.get(family, "mlp"))
        router = block.get_submodule(naive.ROUTER.get(family, "gate"))
        named = [*block.named_buffers(), *block.named_parameters()]
        bias = sum(b.reshape(-1) for n, b in named if n.endswith(("e_score_correction_bias", "expert_bias")))
        experts = [naive.expert(family, config, block.experts, e) for e in range(tiny.EXPERTS)]
        logits, gates, outputs, targets = [], [], [], []
        with torch.no_grad():
            for place in sampled():
                x = seen["entering"][place].double()
                logits.append(router.weight @ x + (router.bias if family == "gpt_oss" else 0))
                routing = naive.ROUTE[family](config, logits[-1], bias)
                gates.append(torch.zeros(tiny.EXPERTS, dtype=torch.float64))
                for e, gate in zip(routing.ids, routing.gates, strict=True):
                    gates[-1][e] = gate
                outputs.append(torch.stack([one.run(x) for one in experts]))
                targets.append(seen["routed"][place].double())
        found[index] = {"logits": torch.stack(logits), "gates": torch.stack(gates)}
        found[index] |= {"outputs": torch.stack(outputs), "targets": torch.stack(targets)}
    return found


def close(got: Tensor, expected: Tensor) -> None:
    """fp32 against float64, all layers before included: relative to the size of the whole."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", [name for name in tiny.EDITABLE if name in naive.ROUTE])
def test_a_probe_holds_what_the_stock_model_computes(family, family_checkpoint):
    probes, expected = probed(family_checkpoint(family)), naive_probe(family)
    assert probes.keys() == expected.keys()
    for index, probe in probes.items():
        logits, gates, outputs, targets = expected[index].values()
        close(probe.logits_TE, logits)
        close(dense(probe.index_TK, probe.gate_TK, tiny.EXPERTS), gates)
        assert torch.equal(probe.component_T, torch.tensor(sampled()) // 12)
        assert torch.equal(probe.ids_TM.sort(1).values, torch.arange(tiny.EXPERTS).expand(SAMPLE, -1))
        for t in range(SAMPLE):
            rows = torch.cat([outputs[t][probe.ids_TM[t]], targets[t][None]])
            close(probe.gram_TNN[t], rows @ rows.T)
        close(probe.mean_ED, outputs.mean(0))
        cosine_EE = torch.zeros(tiny.EXPERTS, tiny.EXPERTS, dtype=torch.float64)
        for t, i, j in itertools.product(range(SAMPLE), range(tiny.EXPERTS), range(tiny.EXPERTS)):
            a, b = outputs[t, i], outputs[t, j]
            cosine_EE[i, j] += (a @ b / (a.norm() * b.norm())) / SAMPLE
        close(probe.cosine_EE, cosine_EE)
        assert probe.inner_EFS.shape == (tiny.EXPERTS, tiny.INNER, SAMPLE)
        assert (probe.routing is None) == (family in ("phimoe", "llama4_text"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"])
def test_inner_activations_give_the_outputs(family, family_checkpoint):
    """Down projection and bias, by hand, of what the probe calls its inputs: their mean is the mean output."""
    model = tiny.make(family)
    for index, probe in probed(family_checkpoint(family)).items():
        experts = getattr(model.model.layers[index], naive.BLOCK.get(family, "mlp")).experts
        down = experts.down_proj.detach()
        down = down.transpose(1, 2) if family in ("gpt_oss", "llama4_text") else down
        mean_ED = torch.stack([down[e] @ probe.inner_EFS[e] for e in range(tiny.EXPERTS)]).mean(2)
        close(probe.mean_ED, mean_ED + experts.down_proj_bias.detach() if family == "gpt_oss" else mean_ED)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2", "phimoe"])
def test_each_token_ranks_its_experts_by_selection_score(family, family_checkpoint):
    bias = {"deepseek_v3": "mlp.gate.e_score_correction_bias", "minimax_m2": "mlp.e_score_correction_bias"}
    model = tiny.make(family)
    for index, probe in probed(family_checkpoint(family)).items():
        score_TE = probe.logits_TE
        if family in bias:
            score_TE = score_TE.sigmoid() + dict(model.model.layers[index].named_buffers())[bias[family]]
        for t in range(SAMPLE):
            used = set(probe.index_TK[t].tolist())
            expected = sorted(range(tiny.EXPERTS), key=lambda e: (e not in used, -float(score_TE[t, e])))
            assert probe.ids_TM[t].tolist() == expected


def test_only_the_best_are_ranked_of_many_experts(tmp_path):
    model = tiny.make("qwen3_moe", num_experts=40, num_experts_per_tok=5)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path))
    for probe in probed(checkpoint).values():
        assert probe.ids_TM.shape == (SAMPLE, 20) and probe.gram_TNN.shape == (SAMPLE, 21, 21)
        assert torch.equal(probe.ids_TM, probe.logits_TE.argsort(1, descending=True)[:, :20])
        assert torch.equal(probe.ids_TM[:, :5].sort(1).values, probe.index_TK.sort(1).values)


def assert_same(a: dict[int, OutputSample], b: dict[int, OutputSample]) -> None:
    assert a.keys() == b.keys()
    for layer, one in a.items():
        for name, tensor in one.tensors().items():
            other = b[layer].tensors()[name]
            if tensor.is_floating_point():
                close(tensor, other)
            else:
                assert torch.equal(tensor, other), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "jamba"])
def test_a_probe_does_not_depend_on_batches_or_chunks(family, family_checkpoint, monkeypatch):
    whole = probed(family_checkpoint(family))
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12)
    alone = probed(family_checkpoint(family))
    assert_same(alone, whole)
    monkeypatch.setattr(probe_module, "CHUNK", 3 * tiny.EXPERTS * 2 * tiny.INNER)
    assert_same(probed(family_checkpoint(family)), whole)


def test_only_the_first_inner_activations_are_kept(family_checkpoint, monkeypatch):
    whole = probed(family_checkpoint("mixtral"))
    monkeypatch.setattr(probe_module, "INNER_TOKENS", 8)
    monkeypatch.setattr(fold_module, "TOKENS_PER_BATCH", 12)
    for index, probe in probed(family_checkpoint("mixtral")).items():
        close(probe.inner_EFS, whole[index].inner_EFS[:, :, :8])


def test_a_sample_of_all_takes_every_real_token(family_checkpoint):
    for probe in probed(family_checkpoint("mixtral"), sample=4096).values():
        assert len(probe.logits_TE) == int(PADDED.sum())


def test_a_probe_survives_being_saved(family_checkpoint):
    probe = probed(family_checkpoint("deepseek_v3"))[1]
    again = OutputSample.from_tensors(load(save(probe.tensors())))
    assert_same({1: again}, {1: probe})
    assert again.routing is not None and again.routing.groups == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "lfm2_moe", "minimax_m2", "deepseek_v3", "olmoe"])
def test_rules_are_found_in_half_precision(family, dtype, family_checkpoint):
    checkpoint = family_checkpoint(family)
    observer = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()))
    seen, _ = forward_layers(StreamedLayers(checkpoint, CPU, dtype), windows_of(IDS, PADDED), [observer])
    for parts in seen:
        assert not parts[0] or OutputSample.from_tensors(parts[0]).routing is not None


def test_another_target_can_be_set(family_checkpoint):
    checkpoint = family_checkpoint("deepseek_v3")
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    first = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()), SAMPLE)
    plain = [parts[0] for parts in forward_layers(layers, windows_of(IDS, PADDED), [first])[0]]
    assert plain[0] == {} and first.routed.shape == (SAMPLE, tiny.HIDDEN)
    last = OutputSample.from_tensors(plain[2])
    close(first.routed.square().sum(1), last.gram_TNN[:, -1, -1])
    wanted = torch.randn(SAMPLE, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    second = OutputSampler(family_of(checkpoint.config), checkpoint.config, int(PADDED.sum()), SAMPLE)
    second.targets = wanted
    other = OutputSample.from_tensors(forward_layers(layers, windows_of(IDS, PADDED), [second])[0][2][0])
    close(other.gram_TNN[:, :-1, :-1], last.gram_TNN[:, :-1, :-1])
    close(other.gram_TNN[:, -1, -1], wanted.square().sum(1))
    close(second.routed, first.routed)
    everything = float(subset_losses(other, [range(tiny.EXPERTS)])[0])
    assert everything == pytest.approx(float((wanted - first.routed).norm() / wanted.norm()), rel=1e-5)


def test_tokens_that_no_expert_reports_are_noticed(family_checkpoint, monkeypatch):
    monkeypatch.setattr(fold_module.hf, "use_experts_function", lambda model: None)
    with pytest.raises(AssertionError, match="layer 0: 0 tokens were heard of, not 20"):
        probed(family_checkpoint("mixtral"))


def observed(model: Any, *others: Any) -> list[list[dict[str, Tensor]]]:
    """What a probe and other observers see of a model in memory."""
    observer = OutputSampler(family_of(model.config), model.config, int(PADDED.sum()), SAMPLE)
    return forward_layers(ResidentLayers(model), windows_of(IDS, PADDED), [observer, *others])[0]


@pytest.mark.parametrize("family", ["deepseek_v2", "llama4_text"])
def test_a_probe_and_sums_are_taken_in_one_pass(family):
    model = tiny.make(family)
    sums = ExpertStatistics(family_of(model.config), model.config, 4)
    alone = forward_layers(ResidentLayers(model), windows_of(IDS, PADDED), [sums])[0]
    for (probe,), (same, table), (expected,) in zip(observed(model), observed(model, sums), alone, strict=True):
        for parts, other in ((probe, same), (table, expected)):
            assert parts.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in parts.items())


def test_skipped_experts_have_no_gate_and_leave_no_rule():
    model = tiny.make("qwen3_moe")
    view = moe_views(model)[1]
    skip_experts(hf.decoder_layers(model)[1], view.names, threshold=0.8, renormalise=False)
    parts = [OutputSample.from_tensors(layer[0]) for layer in observed(model)]
    assert parts[0].routing is not None and parts[1].routing is None
    used_T = (parts[1].gate_TK > 0).sum(1)
    assert set(used_T.tolist()) == {1, 2}
    for t in range(SAMPLE):
        assert set(parts[1].ids_TM[t, : int(used_T[t])].tolist()) == set(
            parts[1].index_TK[t][parts[1].gate_TK[t] > 0].tolist()
        )
        places = [parts[1].ids_TM[t].tolist().index(e) for e in parts[1].index_TK[t].tolist()]
        gate_K, gram_NN = parts[1].gate_TK[t], parts[1].gram_TNN[t]
        close(gate_K @ gram_NN[places][:, places] @ gate_K, gram_NN[-1, -1])


def test_a_layer_whose_router_leads_elsewhere_is_refused():
    model = tiny.make("mixtral")
    keep_experts(hf.decoder_layers(model)[1], moe_views(model)[1].names, experts=range(6), novices=True)
    with pytest.raises(ValueError, match="layer 1: its router leads several ways"):
        observed(model)


# --- kept sets against really cut blocks ----------------------------------------------------------------------

ROUTERS = [
    "mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "minimax_m2", "ernie4_5_moe", "jamba",
    "nemotron_h", "v2 groups", "v3 not renormalised",
]  # fmt: skip


@dataclass
class Real:
    """A block in float64, its probe put together by hand, and what it adds with any of its experts left."""

    block: Block
    shape: MoEShape
    probe: OutputSample
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
    probe = probe_of(block.logits_TE.double(), outputs_TED, target_TD, made(name).identified())
    return Real(block, moe_shapes(model)[0], probe, outputs_TED, target_TD)


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


def probe_of(
    logits_TE: Tensor, outputs_TED: Tensor, target_TD: Tensor, routing: RouterRule, ranked: int | None = None
) -> OutputSample:
    """A probe by hand, in float64: each token's experts in the order in which it would choose them."""
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


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_are_those_of_really_cut_blocks(name):
    """Routers of several families compute in fp32 whatever the model's dtype; the rest is float64."""
    found = real(name)
    for keep in (6, 4):
        sets = sets_of(found.shape, keep)[::3]
        expected = torch.tensor([found.loss(kept) for kept in sets], dtype=torch.float64)
        assert expected.min() > 1e-2
        torch.testing.assert_close(subset_losses(found.probe, sets), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_best_set_is_the_best_of_all_cut_blocks(name):
    found = real(name)
    losses = {kept: found.loss(kept) for kept in sets_of(found.shape, 4)}
    choice = best_subset(found.probe, found.shape, 4)
    assert choice.kept == min(losses, key=lambda kept: losses[kept]) and choice.exhausted == 0
    assert choice.loss == pytest.approx(losses[choice.kept], rel=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_an_observed_probe_gives_the_losses_of_really_cut_blocks(name, family_checkpoint):
    """The engine's fp32 experts and fp32 inner products: a loss is a difference of squares of about its own size."""
    model = tiny.make(name)
    model.set_experts_implementation("eager")
    block = block_of(model.double())
    index = next(i for i, layer in enumerate(hf.decoder_layers(model)) if layer is block.layer)
    experts, (hidden_TD, index_TK, gate_TK) = block.view.experts, given(block)
    target_TD = experts(hidden_TD, index_TK, gate_TK).detach()
    found = Real(block, moe_shapes(model)[0], None, outputs_of(experts, hidden_TD), target_TD)
    probe = probed(family_checkpoint(name), sample=4096, mask=torch.ones_like(PADDED))[index]
    sets = sets_of(found.shape, 6)
    expected = torch.tensor([found.loss(kept) for kept in sets], dtype=torch.float64)
    torch.testing.assert_close(subset_losses(probe, sets), expected, rtol=1e-4, atol=0)
    assert best_subset(probe, found.shape, 6).kept == sets[int(expected.argmin())]


# --- search, on layers made up ---------------------------------------------------------------------------------


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
    """A layer made up: logits, experts' outputs and the probe of them."""

    shape: MoEShape
    probe: OutputSample
    outputs_TED: Tensor

    def added(self, token: int, kept: list[int], unknown: bool = False) -> Tensor:
        """A token's routed output with only `kept` left; `unknown`: without experts that are not in its list."""
        gates = naive_gates(self.probe.routing, self.probe.logits_TE[token].tolist(), kept)
        listed = self.probe.ids_TM[token].tolist()
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
    return Made(shape, probe_of(logits_TE, outputs_TED, target_TD, rule, ranked), outputs_TED)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_losses_equal_one_token_at_a_time(kind):
    found = made_up(kind)
    sets = [kept for keep in (8, 12) for kept in sets_of(found.shape, keep)[::40]]
    expected = [found.loss(list(kept)) for kept in sets]
    assert subset_losses(found.probe, sets).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_losses_do_not_depend_on_chunks(kind, monkeypatch):
    found = made_up(kind)
    sets = sets_of(found.shape, 8)
    whole, order = subset_losses(found.probe, sets), elimination_order(found.probe, found.shape)
    monkeypatch.setattr("moe_compress.methods.expert_drop.subset_loss.CHUNK", 100)
    torch.testing.assert_close(subset_losses(found.probe, sets), whole, rtol=1e-12, atol=0)
    again = elimination_order(found.probe, found.shape)
    assert [ids for ids, _ in again] == [ids for ids, _ in order]


EXACT_STEPS = [kind for kind in RULE_KINDS if kind != "softmax biased"]


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_every_step_of_the_search_is_what_starting_afresh_gives(kind):
    """The loss itself always; what removing each single expert would give, where that is promised to be exact."""
    found = made_up(kind, experts=24, tokens=60)
    layer = SubsetLoss(found.probe)
    search = SubsetSearch(layer)
    size = 24 // found.shape.groups
    for expert in sorted(range(24), key=lambda e: e % size)[: 24 - found.shape.floor]:
        search.remove(expert)
        losses, scale = search.losses(), float(layer.target)
        assert float(losses[-1]) / scale == pytest.approx(
            float(layer.losses(search.alive_E[None])[0]) / scale, rel=1e-9
        )
        if kind in EXACT_STEPS:
            left = search.alive_E.nonzero().flatten()
            without = search.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
            torch.testing.assert_close(losses[left], layer.losses(without)[0], rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("kind", [kind for kind in EXACT_STEPS if "groups" not in kind])
def test_an_expert_that_comes_back_leaves_the_search_as_if_it_had_stayed(kind):
    found = made_up(kind, experts=24, tokens=60)
    search = SubsetSearch(SubsetLoss(found.probe))
    for expert in range(0, 20, 2):
        search.remove(expert)
    for expert in range(0, 20, 2):
        trial = search.with_expert(expert)
        left = trial.alive_E.nonzero().flatten()
        without = trial.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
        expected = trial.layer.losses(without)[0]
        torch.testing.assert_close(trial.losses()[left], expected, rtol=1e-9, atol=0)
        assert not search.alive_E[expert]


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_greedy_elimination_takes_the_best_step_each_time(kind):
    found = made_up(kind)
    path = elimination_order(found.probe, found.shape)
    assert len(path) == (found.shape.num_experts - found.shape.floor) // found.shape.groups
    left = list(range(found.shape.num_experts))
    size = len(left) // found.shape.groups
    for gone, loss in path:
        assert [e // size for e in gone] == list(range(found.shape.groups))
        for expert in gone:
            members = [e for e in left if e // size == expert // size]
            steps = {e: found.loss([other for other in left if other != e]) for e in members}
            if kind in EXACT_STEPS:
                assert expert == min(steps, key=lambda e: steps[e])
            left.remove(expert)
        assert loss == pytest.approx(found.loss(left), rel=1e-9)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_greedy_and_swaps_come_close_to_the_optimum(kind):
    """Never worse than greedy alone, and mostly the best of all sets or close to it; with groups of three, where
    only experts of one group change places, there are more sets from which no swap leads on."""
    gaps = []
    for seed in range(6):
        found = made_up(kind, seed=seed)
        path = [loss for _, loss in elimination_order(found.probe, found.shape)]
        for keep in (8, 4) if found.shape.floor <= 4 else (8,):
            exact = best_subset(found.probe, found.shape, keep)
            quick = best_subset(found.probe, found.shape, keep, exact_up_to=0)
            everything = subset_losses(found.probe, sets_of(found.shape, keep))
            assert exact.loss == pytest.approx(float(everything.min()), rel=1e-12)
            greedy = path[(12 - keep) // found.shape.groups - 1]
            assert exact.loss * (1 - 1e-9) <= quick.loss <= greedy * (1 + 1e-9)
            assert quick.loss == pytest.approx(found.loss(list(quick.kept)), rel=1e-9)
            found.shape.require_ids(quick.kept)
            gaps.append(quick.loss / exact.loss - 1)
    assert sum(gaps) / len(gaps) < (0.02 if found.shape.groups == 1 else 0.06)
    assert sum(gap < 1e-9 for gap in gaps) >= len(gaps) / (2 if found.shape.groups == 1 else 3)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_swaps_lead_from_a_bad_set_to_one_that_no_swap_improves(kind):
    found = made_up(kind, experts=24, tokens=60)
    layer, size = SubsetLoss(found.probe), 24 // found.shape.groups
    search = SubsetSearch(layer)
    for expert in [e for e in range(24) if e % size < size // 2]:
        search.remove(expert)
    start = float(search.losses()[-1])
    better = subset_search._swap(search, found.shape)
    loss = float(better.losses()[-1])
    assert loss < 0.99 * start
    assert loss == pytest.approx(float(layer.losses(better.alive_E[None])[0]), rel=1e-9)
    kept, gone = (mask.nonzero().flatten().tolist() for mask in (better.alive_E, ~better.alive_E))
    found.shape.require_ids(tuple(kept))
    swaps = []
    for new, old in itertools.product(gone, kept):
        if new // size == old // size:
            swaps.append([e for e in kept if e != old] + [new])
    best = float(subset_losses(found.probe, swaps).min()) ** 2 * float(layer.target)
    exact = found.shape.groups == 1 and kind in EXACT_STEPS
    assert best >= loss * (1 - (1e-9 if exact else 0.05))


def test_a_swap_that_greedy_cannot_see_is_found():
    """Where experts are blends of a few vectors, greedy drops some that it misses later."""
    gains = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits_TE = torch.randn(50, 20, generator=generator, dtype=torch.float64)
        base = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        mix = torch.rand(20, 4, generator=generator, dtype=torch.float64)
        outputs_TED = (mix @ base).expand(50, -1, -1).contiguous()
        rule = RouterRule(top_k=2, scores="softmax", renormalised=True)
        target_TD = torch.stack(
            [
                sum(g * outputs_TED[t, e] for e, g in naive_gates(rule, logits_TE[t].tolist(), list(range(20))).items())
                for t in range(50)
            ]
        )
        probe = probe_of(logits_TE, outputs_TED, target_TD, rule)
        shape = MoEShape(layer=0, num_experts=20, top_k=2)
        greedy = dict(zip(range(19, 1, -1), (loss for _, loss in elimination_order(probe, shape)), strict=True))
        gains.append(1 - best_subset(probe, shape, 6).loss / greedy[6])
    assert min(gains) >= -1e-9 and max(gains) > 0.005


@pytest.mark.parametrize("kind", ["softmax renormalised", "softmax", "groups by two"])
def test_experts_that_a_token_ranks_too_low_add_nothing_and_are_counted(kind):
    found = made_up(kind, ranked=5)
    for kept in sets_of(found.shape, 8)[::60]:
        choice = float(subset_losses(found.probe, [kept])[0])
        assert choice == pytest.approx(found.loss(list(kept), unknown=True), rel=1e-9)
    choice = best_subset(found.probe, found.shape, 8, exact_up_to=0)
    short = 0
    for t in range(len(found.outputs_TED)):
        gates = naive_gates(found.probe.routing, found.probe.logits_TE[t].tolist(), list(choice.kept))
        short += not set(gates) <= set(found.probe.ids_TM[t].tolist())
    assert choice.exhausted == pytest.approx(short / len(found.outputs_TED)) and short > 0


def test_very_sharp_gates_stay_finite():
    """A softmax that leaves nothing to anybody else: without its one expert a token's gates are the others'."""
    found = made_up("softmax")
    probe = replace(found.probe, logits_TE=found.probe.logits_TE * 60)
    sharp = Made(found.shape, probe, found.outputs_TED)
    layer, search = SubsetLoss(probe), SubsetSearch(SubsetLoss(probe))
    for expert in (3, 7, 1):
        search.remove(expert)
        left = search.alive_E.nonzero().flatten()
        without = search.alive_E.repeat(len(left), 1).scatter_(1, left[:, None], False)
        torch.testing.assert_close(search.losses()[left], layer.losses(without)[0], rtol=1e-9, atol=0)
    kept = search.alive_E.nonzero().flatten().tolist()
    expected = sum(float((sharp.added(t, kept) - target(found, t)).square().sum()) for t in range(40))
    assert float(search.losses()[-1]) == pytest.approx(expected, rel=1e-9)


def target(found: Made, token: int) -> Tensor:
    """The target in the made-up probe, which belongs to the logits it was made with."""
    return found.added(token, list(range(found.shape.num_experts)))


# --- scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_remove_one_is_the_change_without_one_expert(kind):
    found = made_up(kind)
    everyone = list(range(12))
    expected = [0.0] * 12
    for t in range(len(found.outputs_TED)):
        for e in naive_gates(found.probe.routing, found.probe.logits_TE[t].tolist(), everyone):
            change = found.added(t, everyone) - found.added(t, [other for other in everyone if other != e])
            expected[e] += float(change @ change) / len(found.outputs_TED)
    assert subset_search.remove_one(found.probe, found.shape).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in RULE_KINDS if kind not in ("softmax biased", "groups by two")])
def test_ranked_choice_is_an_election(kind):
    found = made_up(kind)
    rule, left, places = replace(found.probe.routing, scale=1.0), list(range(12)), [0.0] * 12
    for place in range(12):
        votes = dict.fromkeys(left, 0)
        for t in range(len(found.outputs_TED)):
            for e in naive_gates(rule, found.probe.logits_TE[t].tolist(), left):
                votes[e] += 1
        out = min(left, key=lambda e: (votes[e], e))
        places[out] = float(place)
        left.remove(out)
    assert subset_search.ranked_choice(found.probe).tolist() == places


def test_ranked_choice_needs_no_rule():
    found = made_up("softmax renormalised")
    expected = subset_search.ranked_choice(found.probe)
    assert torch.equal(subset_search.ranked_choice(replace(found.probe, routing=None)), expected)


def test_without_a_rule_nothing_can_be_told(family_checkpoint):
    probe = probed(family_checkpoint("phimoe"))[0]
    shape = MoEShape(layer=3, num_experts=8, top_k=2)
    for call in (lambda: best_subset(probe, shape, 4), lambda: elimination_order(probe, shape),
                 lambda: subset_search.remove_one(probe, shape)):  # fmt: skip
        with pytest.raises(ValueError, match="layer 3: its router follows no rule"):
            call()
    with pytest.raises(ValueError, match="this layer: its router"):
        subset_losses(probe, [(0, 1)])


def test_counts_that_cannot_be_are_refused():
    found = made_up("groups by two")
    with pytest.raises(ValueError, match="possible counts are 8, 12"):
        best_subset(found.probe, found.shape, 10)
