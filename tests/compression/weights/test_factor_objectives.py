"""Factors that make up for what earlier layers lost (anchored), and factors as the loss sees them (two_sided)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.calibration.input_crosses import InputCrosses, OriginalInputs
from moe_compress.calibration.output_grams import OutputGrams
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.weights.layer_grams import GramCollector
from moe_compress.compression.weights.output_grams import outputs_of
from moe_compress.engine import forward
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.methods.factor_method import LayerExperts
from moe_compress.methods.factorisation.solve import errors
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models.families import family_of
from moe_compress.models.matrices import INNER, ROUTED
from moe_compress.models.moe import learned_view, moe_views, permute_neurons
from moe_compress.recipes.parser import parse
from support import naive_pruning as slow
from support import tiny
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.pruned import report
from support.slow import slow_after
from support.tiny import windows_of

IDS = tiny.token_ids(rows=4, length=12)
PADDED = torch.arange(12)[None] < torch.tensor([12, 7, 3, 10])[:, None]
MANY = tiny.token_ids(rows=64, length=32)
FAMILIES = ["mixtral", "gpt_oss", "llama4_text", "nemotron_h", "deepseek_v3"]
SHORTER = 0.7


def layers_of(checkpoint: Checkpoint) -> StreamedLayers:
    return StreamedLayers(checkpoint, tiny.CPU, torch.float32)


def naive_crosses(family: str, checkpoint: Checkpoint) -> dict[int, dict[str, Tensor]]:
    """Layer -> sums over the real tokens, one at a time in float64: routed by the stream in which down is shorter."""
    stock, shorter = (tiny.make(family).double().requires_grad_(False) for _ in range(2))
    for layer in slow.entering(shorter, family, IDS):
        for *_, down in slow.matrices(shorter, family, layer):
            down.mul_(SHORTER)
    before, now = (slow.entering(model, family, IDS, PADDED) for model in (stock, shorter))
    found = {}
    for layer, (now_TD, _) in now.items():
        experts, config = slow.block_of(stock, family, layer).experts, stock.config
        sums = {
            source: torch.zeros(tiny.EXPERTS, width, width, dtype=torch.float64)
            for source, width in ((ROUTED, tiny.HIDDEN), (INNER, tiny.INNER))
        }
        for x, y in zip(before[layer][0], now_TD, strict=True):
            choice, _ = slow.routing(stock, family, layer, y)
            for e, gate in zip(choice.ids, choice.gates, strict=True):
                on_input = family == "llama4_text"
                given, seen, count = (gate * x, gate * y, 1) if on_input else (x, y, gate**2)
                made = [slow.inner(family, config, experts, e, each) for each in (given, seen)]
                sums[ROUTED][e] += count * torch.outer(given, seen)
                sums[INNER][e] += count * torch.outer(*made)
        found[layer] = sums
    return found


@pytest.mark.parametrize("family", slow_after(4, FAMILIES))
def test_crosses_pair_the_same_tokens_of_two_streams(family, family_checkpoint):
    checkpoint = family_checkpoint(family)
    layers, expected, seen = layers_of(checkpoint), naive_crosses(family, checkpoint), []
    turns = [None, range(0, 5), range(5, tiny.EXPERTS)]

    def visit(index, layer, original, compressed):
        view = learned_view(layer, family_of(checkpoint.config))
        if view is None:
            original([], True)
            compressed([], True)
            return
        inputs = OriginalInputs(family_of(checkpoint.config))
        original([inputs], True)
        totals, crosses = [], InputCrosses(family_of(checkpoint.config), inputs.batches)
        for experts in turns:
            if experts is not None and experts.start == 0:
                crosses = InputCrosses(family_of(checkpoint.config), inputs.batches)
            crosses.experts = experts
            compressed([crosses], False)
            totals.append({source: moments.total for source, moments in crosses.found.items()})
        for source, wanted_EII in expected[index].items():
            limit = {"rtol": 1e-4, "atol": 1e-5 * float(wanted_EII.abs().max())}
            torch.testing.assert_close(totals[0][source].double(), wanted_EII, **limit)
            torch.testing.assert_close(torch.cat([part[source] for part in totals[1:]]).double(), wanted_EII, **limit)
            torch.testing.assert_close(crosses.found[source].pooled.double(), wanted_EII.sum(0), **limit)
        view.stacks()["down"].mul_(SHORTER)
        compressed([], True)
        seen.append(index)

    walk_layers(layers, windows_of(IDS, PADDED), visit, streams=2)
    assert seen == [*expected]


# --- gradients at outputs -----------------------------------------------------------------------------------


def activated(family: str, config: Any, outputs: list[Tensor]) -> Tensor:
    """What a down projection is given, from what gate (where there is one) and up put out."""
    if family == "nemotron_h":
        return torch.clamp(outputs[0], min=0) ** 2
    gate, up = outputs
    if family == "gpt_oss":
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(config.swiglu_alpha * gate)
    return gate * torch.sigmoid(gate) * up


def naive_outputs(family: str, layer: int, pools: bool) -> dict[str, Tensor]:
    """Means of the gradients' outer products from one backward pass through the stock model, token by token."""
    model = tiny.make(family).double()
    model.set_experts_implementation("eager")
    held: list[Tensor] = []
    experts = slow.block_of(model, family, layer).experts
    hook = experts.register_forward_hook(lambda _m, _args, out: held.append(out))
    logits = model(IDS, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, held)
    hook.remove()
    gradient_TD = gradient.reshape(-1, IDS.numel(), tiny.HIDDEN)[0]
    parts = ["up"] if family == "nemotron_h" else ["gate", "up"]
    model.requires_grad_(False)
    sums = {part: torch.zeros(tiny.EXPERTS, tiny.INNER, tiny.INNER, dtype=torch.float64) for part in parts}
    counts = torch.zeros(tiny.EXPERTS, dtype=torch.float64)
    for x, g in zip(slow.entering(model, family, IDS)[layer][0], gradient_TD, strict=True):
        choice, _ = slow.routing(model, family, layer, x)
        for e, gate in zip(choice.ids, choice.gates, strict=True):
            *before, down = slow.matrices(model, family, layer)[e]
            seen, outside = (gate * x, torch.ones(())) if family == "llama4_text" else (x, gate)
            outputs = [matrix @ seen for matrix in before]
            if family == "gpt_oss":
                outputs = [out + experts.gate_up_proj_bias[e, i::2] for i, out in enumerate(outputs)]
            leaves = [out.requires_grad_() for out in outputs]
            added = outside * (down @ activated(family, model.config, leaves))
            for part, back in zip(parts, torch.autograd.grad(added @ g, leaves), strict=True):
                sums[part][e] += torch.outer(back, back)
            counts[e] += float(outside) ** 2
    found = {part: total / counts.clamp_min(1e-300)[:, None, None] for part, total in sums.items()}
    if pools:
        found = {part: total.sum(0) / counts.sum() for part, total in sums.items()}
    return {**found, "down": gradient_TD.T @ gradient_TD / len(gradient_TD)}


def options(**given: Any) -> WeightStageOptions:
    return WeightStageOptions(**given)


@pytest.mark.parametrize(
    ("family", "pools"),
    slow_after(5, [*((family, False) for family in FAMILIES[:4]), ("mixtral", True), ("deepseek_v3", False)]),
)
def test_gradients_at_outputs_are_those_of_the_whole_model(family, pools, family_checkpoint, tmp_path):
    layers = layers_of(family_checkpoint(family))
    observer = OutputGrams(family_of(layers.model.config), tmp_path, pools)
    assert not any(backward(layers, windows_of(IDS), observer, tmp_path / "entered"))
    for layer in moe_views(layers.model):
        found = outputs_of(tmp_path, layer, tiny.EXPERTS, options(), None, tiny.CPU)
        expected = naive_outputs(family, layer, pools)
        assert found.keys() == expected.keys()
        for part, wanted in expected.items():
            wanted_EOO = wanted.expand(tiny.EXPERTS, -1, -1)
            for e in range(tiny.EXPERTS):
                if bool(wanted_EOO[e].any()):
                    limit = {"rtol": 2e-3, "atol": 1e-4 * float(wanted_EOO[e].abs().max())}
                    torch.testing.assert_close(found[part][e].double(), wanted_EOO[e], **limit)


@pytest.mark.parametrize("family", slow_after(1, ["gpt_oss", "mixtral"]))
def test_gradients_follow_neurons_that_are_put_in_order(family, family_checkpoint, tmp_path):
    layers = layers_of(family_checkpoint(family))
    index, order_EF = max(moe_views(layers.model)), None

    class Ordered(OutputGrams):
        def enter(self, layer_index, layer):
            view = learned_view(layer, self.family)
            if order_EF is not None and view is not None and layer_index == index:
                permute_neurons(view, order_EF)
            super().enter(layer_index, layer)

    backward(layers, windows_of(IDS), Ordered(family_of(layers.model.config), tmp_path / "one", False), tmp_path)
    generator = torch.Generator().manual_seed(2)
    order_EF = torch.stack([torch.randperm(tiny.INNER, generator=generator) for _ in range(tiny.EXPERTS)])
    backward(layers, windows_of(IDS), Ordered(family_of(layers.model.config), tmp_path / "two", False), tmp_path)
    words = options(shrink=6.0, min_tokens=20)
    one = outputs_of(tmp_path / "one", index, tiny.EXPERTS, words, order_EF, tiny.CPU)
    two = outputs_of(tmp_path / "two", index, tiny.EXPERTS, words, None, tiny.CPU)
    for part, grams in one.items():
        for e in range(tiny.EXPERTS):
            torch.testing.assert_close(grams[e], two[part][e], rtol=1e-3, atol=1e-4 * float(two[part][e].abs().max()))


# --- what the objectives gain -------------------------------------------------------------------------------


class Added(OriginalInputs):
    """What the routed experts add, batch by batch."""

    def rows(self, rows):
        self.batches.append(rows.routed_TD.double())


def words(sentence: str) -> dict[str, Any]:
    """All parameters of a factorise recipe that are the method's own."""
    stage = parse(f"factorise {sentence}").stages[0]
    return {name: stage.parameters[name] for name in registry.find("factorise").declaration.parameters}


def collector(layers: StreamedLayers, folder: Path, outputs: bool) -> GramCollector:
    family = family_of(layers.model.config)
    return GramCollector(family, options(), False, folder, tiny.CPU, torch.float32, outputs)


def factored(experts: LayerExperts, own: dict[str, Any]) -> Any:
    return registry.find("factorise").run(experts, **own)


@pytest.mark.parametrize("structure", slow_after(2, ["svd", "base_delta", "shared_basis"]))
def test_anchored_factors_are_nearer_behind_a_layer_that_changed(structure, family_checkpoint, tmp_path):
    """Of the second layer, whose inputs are not what they were, the output with each objective's factors."""
    layers = layers_of(family_checkpoint("mixtral"))
    family, lost = family_of(layers.model.config), {}
    factoring = registry.find("factorise").implementation.factoring
    own = {objective: words(f"structure={structure} objective={objective}") for objective in ("activation", "anchored")}

    def added(run, go_on):
        seen = Added(family)
        run([seen], go_on)
        return torch.cat(seen.batches)

    def visit(index, layer, original, compressed):
        view = learned_view(layer, family)
        inputs = OriginalInputs(family)
        original([inputs], False)
        wanted_TD = added(original, True)
        grams = collector(layers, tmp_path, False)
        grams.collect(view, compressed, False, inputs.batches)
        experts = grams.experts(index, view, factoring, own["anchored"], {})
        before = {part: stack.clone() for part, stack in view.stacks().items()}
        for objective, each in own.items():
            given = experts if objective == "anchored" else replace(experts, crosses={})
            for part, factors in factored(given, each).factors.items():
                view.stacks()[part].copy_(factors.dense())
            lost[index, objective] = float((added(compressed, False) - wanted_TD).square().sum())
            if objective == "activation":
                kept = {part: stack.clone() for part, stack in view.stacks().items()}
            for part, stack in before.items():
                view.stacks()[part].copy_(stack)
        for part, stack in kept.items():
            view.stacks()[part].copy_(stack)
        compressed([], True)

    walk_layers(layers, windows_of(MANY), visit, streams=2)
    assert lost[0, "anchored"] == pytest.approx(lost[0, "activation"], rel=1e-3)
    for index in range(1, tiny.LAYERS):
        assert lost[index, "anchored"] < 0.97 * lost[index, "activation"]


@pytest.mark.parametrize(("structure", "share"), [("svd", 0.95), ("base_delta", 1.0)])
def test_two_sided_factors_lose_less_as_the_loss_sees_it(structure, share, family_checkpoint, tmp_path):
    """Where experts share what writes outputs, all of them get the same weights for these: that gains less."""
    layers = layers_of(family_checkpoint("gpt_oss"))
    family, factoring = family_of(layers.model.config), registry.find("factorise").implementation.factoring
    backward(layers, windows_of(MANY), OutputGrams(family, tmp_path, pools=False), tmp_path / "entered")
    own = {
        objective: words(f"structure={structure} objective={objective}") for objective in ("activation", "two_sided")
    }

    def visit(index, layer, run):
        view = learned_view(layer, family)
        grams = collector(layers, tmp_path, True)
        grams.collect(view, run, True)
        experts = grams.experts(index, view, factoring, own["two_sided"], {})
        one = factored(replace(experts, outputs={}), own["activation"])
        two = factored(experts, own["two_sided"])
        for part, left in experts.outputs.items():
            sides = (experts.weights[part], experts.grams[part])
            lost = [errors(sides[0], found.factors[part], sides[1], left)[1] for found in (one, two)]
            assert lost[1] < share * lost[0], part
            # Errors are reported as every objective's are; what the objective sees comes beside them.
            assert two.report[part]["whitened"] >= 0.999 * one.report[part]["whitened"]
            assert two.report[part]["lost"] <= two.report[part]["lost_at_first"]

    walk_layers(layers, windows_of(MANY[:32]), visit)


# --- as recipes say it --------------------------------------------------------------------------------------

Made = Callable[[str, str], Path]


def dense(folder: Path) -> list[dict[str, Tensor]]:
    return [view.stacks() for view in moe_views(moe_compress.load(folder, torch.float32)).values()]


def test_with_nothing_before_it_the_first_layer_is_as_without_an_anchor(made: Made):
    found = (made("gpt_oss", f"factorise structure=svd objective={word}") for word in ("activation", "anchored"))
    one, other = (dense(folder) for folder in found)
    for part, stack in one[0].items():
        torch.testing.assert_close(other[0][part], stack, rtol=1e-3, atol=1e-3 * float(stack.abs().max()))
    assert not torch.equal(one[1]["down"], other[1]["down"])


TURNS = {
    "anchored": "factorise structure=svd objective=anchored shrink=30",
    "two_sided": "factorise structure=svd objective=two_sided shrink=30",
}


@pytest.mark.parametrize(("objective", "family"), [("anchored", "mixtral"), ("two_sided", "gpt_oss")])
def test_a_few_experts_at_a_time_or_all_at_once(objective, family, made):
    one, parts = (dense(made(family, f"{TURNS[objective]}{turns}")) for turns in ("", " experts_at_once=3"))
    for layer, other in zip(one, parts, strict=True):
        for part, stack in layer.items():
            torch.testing.assert_close(other[part], stack, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "call"), slow_after(3, [("anchored", 4), ("two_sided", 3), ("two_sided", 0), ("anchored", 1)])
)
def test_a_stopped_run_goes_on_with_the_same_bytes(objective, call, lab, made, monkeypatch, tmp_path):
    """Each layer runs three times, or twice; and where gradients come back, once before the first."""
    sentence, whole = TURNS[objective], made("mixtral", TURNS[objective])
    given = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=call)
        moe_compress.compress(sentence, **given)
    with monkeypatch.context() as patch:
        layers = counting(patch, forward.hf, "run_layer")
        folder = moe_compress.compress(sentence, **given).folder
    each, first = (3, 0) if objective == "anchored" else (2, tiny.LAYERS)
    done = max(0, call - first) // each
    assert len(layers) == (tiny.LAYERS - done) * each + (first if call < first else 0)
    assert outcome(folder) == outcome(whole) and report(folder) == report(whole)
    assert leftovers(tmp_path) == []


def test_ranks_are_shared_out_as_the_loss_sees_them(made):
    """Neurons that are put in order, and one matrix of gradients for all experts, go with it."""
    words = "structure=base_delta budget=global objective=two_sided"
    each, together = (report(made("mixtral", f"factorise {words} {more}")) for more in ("align=true", "grams=pooled"))
    plain = report(made("mixtral", "factorise structure=base_delta budget=global"))
    for found in (each, together, plain):
        assert 0.45 < found["kept"] <= 0.5
    sizes = [
        [said["parameters"] for part in found["projections"].values() for said in part.values()]
        for found in (each, plain)
    ]
    assert sizes[0] != sizes[1]


def test_auto_leaves_out_what_would_not_stay_sparse(made):
    for projections in report(made("mixtral", "factorise structure=auto objective=two_sided"))["projections"].values():
        for said in projections.values():
            assert said["tried"] and "sparse_low_rank" not in said["tried"]
            assert said["structure"] == min(said["tried"], key=said["tried"].get)


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("objective=anchored propagate=original", "use propagate=compressed"),
        ("objective=anchored grams=pooled", "it goes with grams=expert"),
        ("objective=two_sided structure=sparse_low_rank", "would not stay sparse"),
    ],
)
def test_words_that_do_not_go_with_an_objective(sentence, words, refused, reader_folder):
    assert words in refused(f"factorise {sentence}", model=str(reader_folder("mixtral")))


@pytest.mark.parametrize(("objective", "which"), [("anchored", "gram"), ("two_sided", "gradient")])
def test_what_does_not_fit_is_said(objective, which, lab, monkeypatch, tmp_path):
    free = {"gram": "stage", "gradient": "factor_stage"}[which]
    monkeypatch.setattr(f"moe_compress.compression.weights.{free}.free_memory", lambda _device: 1000)
    with pytest.raises(ValueError, match="use grams=pooled"):
        moe_compress.compress(f"factorise objective={objective}", **{**lab("mixtral"), "out": str(tmp_path / "out")})
