"""Bits that are shared out: exactly to the budget, and as a naive loop would measure them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress import api
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.weights import bit_sensitivity
from moe_compress.methods import registry
from moe_compress.methods.quantization.bit_allocation import bit_cost_by_use, cheapest_widths, choose
from moe_compress.methods.quantization.grid import BITS
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from moe_compress.recipes.parser import parse
from support import naive_quantization as slow
from support import tiny
from support.editing import logits_of
from support.pruned import refused, report, stock
from support.slow import each_once, slow_after, slow_unless

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")

AUTO = "quantize method=rtn bits=auto group_size=8 clip=max"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("budget", [2.0, 2.4, 3.0, 4.5, 8.0])
def test_the_knapsack_is_solved_exactly(budget):
    for seed, sizes in ((0, [1] * 5), (1, [4, 1, 2, 1, 3])):
        cost = random(5, 4, seed=seed).abs() * torch.tensor([64.0, 16.0, 4.0, 0.1])
        found = cheapest_widths(cost, sizes, budget)
        allowed = [
            choice
            for choice in itertools.product(range(4), repeat=5)
            if sum(BITS[k] * s for k, s in zip(choice, sizes, strict=True)) <= budget * sum(sizes) + 1e-9
        ]
        best = min(float(sum(cost[n, k] for n, k in enumerate(choice))) for choice in allowed)
        mine = float(sum(cost[n, BITS.index(bits)] for n, bits in enumerate(found)))
        assert mine == pytest.approx(best) and sum(map(int.__mul__, found, sizes)) <= budget * sum(sizes) + 1e-9


def test_what_gets_one_width_gets_one():
    costs = {layer: {name: random(3, 4, seed=n).abs() for n, name in enumerate("abc")} for layer in (0, 2)}
    for per, alike in (("matrix", 1), ("expert", 3), ("layer", 9)):
        bits = choose(costs, {0: 10, 2: 10}, per, 3.0)
        flat = [bits[layer][name][e] for layer in (0, 2) for e in range(3) for name in "abc"]
        assert sum(flat) <= 3 * len(flat) and set(flat) <= set(BITS)
        assert all(len(set(flat[i : i + alike])) == 1 for i in range(0, len(flat), alike))


def test_utilisation_gives_to_the_used_or_to_the_rare():
    share = torch.tensor([0.7, 0.2, 0.05, 0.05])
    used, rare = (cheapest_widths(bit_cost_by_use(share, first), [1] * 4, 3.25) for first in (False, True))
    assert used[0] > used[3] and rare[3] > rare[0]


SHARED_OUT = ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text")
BUDGETS = ("budget=2.5", "budget=3 by=gradient", "budget=4 per=layer", "budget=3 by=used")


@pytest.mark.parametrize(("family", "words"), slow_unless(each_once(SHARED_OUT, BUDGETS), SHARED_OUT, BUDGETS))
def test_bits_add_up_to_the_budget_on_the_written_file(family, words, made):
    folder = made(family, f"{AUTO} {words}")
    model = moe_compress.load(folder, torch.float32)
    packed = [m for m in model.modules() if isinstance(m, PackedMatrix)]
    weights = sum(m.in_features * m.out_features for m in packed)
    budget = float(words.split()[0].partition("=")[2])
    mean = sum(m.bits * m.in_features * m.out_features for m in packed) / weights
    # One matrix more at the next width would be too much.
    most = max(m.in_features * m.out_features for m in packed) * 4 / weights
    assert budget - (most if "layer" not in words else 1) <= mean <= budget
    assert report(folder)["bits"]["experts"] == pytest.approx(mean)
    assert json.loads((folder / "config.json").read_text())["model_type"].startswith("moe_compress_")
    torch.testing.assert_close(logits_of(load_model(folder, torch.float32)), logits_of(model))


def naive_costs(model: Any, windows: Any, layer: int, by: str) -> dict[str, Tensor]:
    """By matrix: [expert, width], from hooks on the stock model and one expert, matrix and width at a time, float64."""
    view, seen = moe_views(model)[layer], {}

    def remember(name: str, _module: Any, args: Any, out: Any) -> None:
        seen[name] = args[0], out
        if name == "block":
            (out[0] if isinstance(out, tuple) else out).retain_grad()

    parts = {"router": view.router, "block": view.block, "layer": model.model.layers[layer]}
    hooks = [module.register_forward_hook(functools.partial(remember, name)) for name, module in parts.items()]
    logits = model(windows.ids_NS, use_cache=False).logits.float()
    predicted, target = logits[:, :-1].flatten(0, 1), windows.ids_NS[:, 1:].flatten()
    torch.nn.functional.cross_entropy(predicted, target).backward()
    for hook in hooks:
        hook.remove()
    whole = lambda found: (found[0] if isinstance(found, tuple) else found).detach().double()  # noqa: E731
    x = seen["block"][0].detach().double().reshape(-1, tiny.HIDDEN)
    out = seen["block"][1][0] if isinstance(seen["block"][1], tuple) else seen["block"][1]
    gradient = out.grad.double().reshape(-1, tiny.HIDDEN)
    metric = gradient.T @ gradient / len(gradient)
    energy = float(whole(seen["layer"][1]).reshape(-1, tiny.HIDDEN).square().sum(1).mean())
    _, weights, chosen = seen["router"][1]
    stacks = {name: stack.detach().double() for name, stack in view.stacks().items()}
    costs = {name: torch.zeros(tiny.EXPERTS, len(BITS), dtype=torch.float64) for name in stacks}
    for e in range(tiny.EXPERTS):
        tokens, places = (chosen == e).nonzero().unbind(1)
        gates = weights[tokens, places].detach().double().unsqueeze(1)
        own = {name: stack[e] for name, stack in stacks.items()}

        def adds(own: dict[str, Tensor], rows: Tensor = x[tokens], gates: Tensor = gates) -> Tensor:
            return gates * ((torch.nn.functional.silu(rows @ own["gate"].T) * (rows @ own["up"].T)) @ own["down"].T)

        for name in stacks:
            for k, bits in enumerate(BITS):
                rounded = slow.dequantized(*slow.rtn(own[name].float(), bits, 8, torch.float32, "mse"))
                change = adds({**own, name: rounded}) - adds(own)
                seen_as = change.square().sum() / energy if by == "error" else ((change @ metric) * change).sum()
                costs[name][e, k] = seen_as / chosen.numel()
    return costs


@pytest.mark.parametrize("by", slow_after(1, ["error", "gradient"]))
def test_sharing_out_is_measured_as_a_naive_loop_would(by, lab, monkeypatch):
    """What rounding a matrix alone changes of what its expert adds, gates and shares of the tokens included.

    Scales are searched: where the largest weight sets them, it is a tie, and either code is right.
    """
    costs: dict[int, Any] = {}
    parsed = parse(f"{AUTO} budget=3 by={by}".replace("max", "mse"), (), lab("mixtral"))
    run, source = api.start(parsed.options), open_checkpoint(Path(str(lab("mixtral")["model"])))
    spans = {(i, f"mlp.experts.{part}"): 8 for i in range(tiny.LAYERS) for part in ("gate", "up", "down")}
    (stage,) = parsed.stages
    allocation = registry.find(stage.method).implementation.allocates_bits(stage.parameters)
    allocation = dataclasses.replace(allocation, choose=lambda found, _sizes: costs.update(found) or {})
    bit_sensitivity.expert_bits(allocation, source, run, spans)
    model = stock(str(lab("mixtral")["model"]))
    for name, expected in naive_costs(model, run.windows("calibration", source), 1, by).items():
        torch.testing.assert_close(
            costs[1][f"mlp.experts.{name}"].double(), expected, rtol=0.02, atol=1e-3 * float(expected.max())
        )


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("gpt_oss", "quantize format=gptq group_size=8", "format=gptq packs matrices one by one, but gpt_oss stores"),
        ("mixtral", "quantize bits=auto budget=3 format=gptq", "format=gptq holds one width for all experts"),
        ("mixtral", "quantize bits=auto budget=9", "the mean bits a weight, from 2 to 8, not"),
        ("mixtral", "quantize bits=auto budget=1.5", "the mean bits a weight, from 2 to 8, not"),
        ("mixtral", "quantize bits=auto budget=3 where=all", "shares out bits among experts"),
        ("mixtral", "quantize method=awq experts_at_once=2", "quantize.experts_at_once=2 would do nothing"),
        ("mixtral", "prune pattern=2:4 + channels keep=8", "it would not leave 2:4 as it is"),
        ("mixtral", "prune pattern=2:4 + expert_merge keep=6", "it would not leave 2:4 as it is"),
        ("mixtral", "prune allocate=both unseen=dense", "allocate=both keeps a budget"),
    ],
)
def test_what_cannot_be(family, sentence, said, lab, tmp_path):
    assert said in refused(sentence, lab(family), tmp_path)
