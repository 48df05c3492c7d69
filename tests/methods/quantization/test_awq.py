"""AWQ's rescaling, bits that are shared out, GPTQ's layout: on every family, and against naive references."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moe_compress
import naive_quantization as slow
import tiny
from editing import logits_of
from moe_compress import api
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.weights import bit_sensitivity, stage
from moe_compress.compression.weights.bit_sensitivity import choose
from moe_compress.compression.weights.norm_readers import NormReaders
from moe_compress.compression.weights.rescaling import Rescale
from moe_compress.engine.forward import walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.quantization.awq import awq_scale
from moe_compress.methods.quantization.bit_allocation import bit_cost_by_use, cheapest_widths
from moe_compress.methods.quantization.grid import BITS
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from moe_compress.recipes.parser import parse
from test_identity import CPU, windows_of
from test_pruning import refused, report, stock

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")
Options = dict[str, object]
Made = Callable[[str, str], Path]
AWQ = "quantize method=awq group_size=8 min_tokens=1 clip=max"
AUTO = "quantize method=rtn bits=auto group_size=8 clip=max"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- AWQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_scales_are_those_of_the_naive_search(bits, pow2):
    x_RI = random(300, 32) * random(32, seed=1).exp()
    weights = [random(2, rows, 32, seed=rows) for rows in (8, 12)]
    gram = (x_RI.T @ x_RI / len(x_RI)).expand(2, -1, -1)
    scale_1I = awq_scale([(w, gram) for w in weights], gram[0].diagonal()[None], bits, 8, torch.float32, pow2=pow2)
    stacks = [(w[b].double(), gram[0].double()) for w in weights for b in range(2)]
    diagonal_I = gram[0].diagonal().double()
    expected_I = slow.awq_scale(
        [w for w, _ in stacks], [g for _, g in stacks], diagonal_I, bits, 8, torch.float32, pow2=pow2
    )

    def error(scale_I: Tensor) -> float:
        rounded = [slow.dequantized(*slow.rtn(w * scale_I, bits, 8, torch.float32, "max")) / scale_I for w, _ in stacks]
        return sum(slow.output_error(w, new, g) for (w, g), new in zip(stacks, rounded, strict=True))

    # The largest weight of a group lies half-way between two codes: which of them it gets is a matter of rounding.
    assert float(error(scale_1I[0].double())) == pytest.approx(float(error(expected_I)), rel=2e-2)
    assert not pow2 or torch.equal(scale_1I.log2(), scale_1I.log2().round())


def rescaled(family: str, checkpoint: Any, scale: float) -> tuple[Tensor, Tensor, list[str]]:
    """Logits of routers and hidden states before and after every norm is rescaled, and which norms those are."""
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    done: list[str] = []
    outputs: list[list[Tensor]] = [[], []]

    def visit(index: int, layer: torch.nn.Module, run: Any) -> None:
        feeds = NormReaders(family_of(layers.model.config))
        run([feeds], False, True)
        matrices = layer_matrices(layer, family_of(layers.model.config))
        for side in (0, 1):
            view = moe_views(layers.model).get(index)
            keep = functools.partial(kept, outputs[side])
            hook = None if view is None else view.router.register_forward_hook(keep)
            run([], False)
            if hook is not None:
                hook.remove()
            for norm, modules in feeds.found.items() if side == 0 else ():
                reading = [m for m in matrices if m.name in modules or m.name.rpartition(".")[0] in modules]
                routed = [m for m in reading if m.source in ("routed", "router")]
                if len(routed) >= 2:
                    width = routed[0].weight_BOI.shape[2]
                    power_1I = torch.tensor([2.0, 0.25, 1.0, 8.0]).repeat(width // 4)[None] * scale
                    names = [m.name for m in reading if m.source != "inner"]
                    Rescale(norm, tuple(names), power_1I, family == "qwen3_next").apply(
                        layer, family_of(layers.model.config)
                    )
                    done.append(norm)
        run([], True)

    walk_layers(layers, windows_of(tiny.token_ids()), visit)
    return torch.cat([t.flatten() for t in outputs[0]]), torch.cat([t.flatten() for t in outputs[1]]), done


def kept(found: list[Tensor], _module: Any, _args: Any, output: Any) -> None:
    found.append(output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "olmoe"])
def test_the_scales_that_are_found_for_a_router_are_powers_of_two(family, lab, monkeypatch, tmp_path):
    """And change no token's experts, in bf16, before anything is rounded."""
    found: list[Any] = []
    before = Rescale.apply

    def applied(self: Rescale, layer: Any, owner: Any) -> None:
        found.append(self)
        before(self, layer, owner)

    monkeypatch.setattr(Rescale, "apply", applied)
    asked = stage.WeightStage._choices
    monkeypatch.setattr(stage.WeightStage, "_choices", lambda self, run, _wanted=False: asked(self, run, True))
    options = {**lab(family), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{AWQ} bits=4", **options).folder
    norms = [each for each in found if each.maker.endswith("norm")]
    assert norms and all(bool((each.scale.log2() % 1 == 0).all()) for each in norms if "gate" in str(each.readers))
    changes = report(folder)["routing_rescaled"].values()
    assert changes and all(each["flips"] == 0 and each["overlap"] == 1 for each in changes)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "olmoe", "granitemoeshared"])
def test_powers_of_two_change_no_routing(family, family_checkpoint):
    before, after, done = rescaled(family, family_checkpoint(family), 1.0)
    assert done and torch.equal(before, after)


def require_close(folder: Path, whole: Any) -> None:
    """8 bits change little: what was made larger was made smaller elsewhere, router and shared experts included.

    Some tokens of random models choose other experts all the same, so it is the middle one that counts.
    """
    expected = logits_of(whole)
    error = (logits_of(load_model(folder, torch.float32)) - expected).abs().amax(-1).median()
    assert float(error) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_awq_rescales_what_it_can_and_nothing_else(family, made, lab):
    folder = made(family, f"{AWQ} bits=8 format=dense")
    said, whole = report(folder), stock(str(lab(family)["model"]))
    assert len(said["rescaled"]) + len(said["not_rescaled"]) > 0
    require_close(folder, whole)


def test_free_scales_report_the_routing_that_they_change(made):
    said = report(made("mixtral", f"{AWQ} bits=4 scales=free"))
    assert said["routing_rescaled"].keys() == {"0", "1", "2"}
    assert all(0 <= each["flips"] < 0.1 and each["overlap"] > 0.9 for each in said["routing_rescaled"].values())
    assert not report(made("mixtral", f"{AWQ} bits=4"))["routing_rescaled"]


def test_awq_in_half_precision_stores_what_it_made_of_the_original(lab, tmp_path):
    options = {**lab("qwen2_moe"), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{AWQ} bits=8 format=dense", **options).folder
    whole = stock(str(options["model"]))
    assert report(folder)["rescaled"]
    require_close(folder, whole)


# --- bits that are shared out ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text"])
@pytest.mark.parametrize("words", ["budget=2.5", "budget=3 by=gradient", "budget=4 per=layer", "budget=3 by=used"])
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


@pytest.mark.parametrize("by", ["error", "gradient"])
def test_sharing_out_is_measured_as_a_naive_loop_would(by, lab, monkeypatch):
    """What rounding a matrix alone changes of what its expert adds, gates and shares of the tokens included.

    Scales are searched: where the largest weight sets them, it is a tie, and either code is right.
    """
    costs: dict[int, Any] = {}
    monkeypatch.setattr(bit_sensitivity, "choose", lambda found, *_: costs.update(found) or {})
    parsed = parse(f"{AUTO} budget=3 by={by}".replace("max", "mse"), (), lab("mixtral"))
    run, source = api.start(parsed.options), open_checkpoint(Path(str(lab("mixtral")["model"])))
    spans = {(i, f"mlp.experts.{part}"): 8 for i in range(tiny.LAYERS) for part in ("gate", "up", "down")}
    bit_sensitivity.expert_bits(parsed.stages[0], source, run, spans)
    model = stock(str(lab("mixtral")["model"]))
    for name, expected in naive_costs(model, run.windows("calibration", source), 1, by).items():
        torch.testing.assert_close(
            costs[1][f"mlp.experts.{name}"].double(), expected, rtol=0.02, atol=1e-3 * float(expected.max())
        )


# --- GPTQ's layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "nemotron_h"])
def test_gptq_layout_is_what_other_readers_expect(family, bits, made):
    folder = made(family, f"quantize method=rtn group_size=8 clip=max bits={bits} format=gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 8, True, False)
    tensors = {k: t for path in folder.glob("model*.safetensors") for k, t in load_file(path).items()}
    checkpoint = open_checkpoint(folder)
    assert checkpoint.packed
    for name in checkpoint.packed[:6]:
        stem = name.removesuffix(".weight")
        words, zeros, scales, index = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        inputs, outputs = len(index), scales.shape[1]
        codes = slow.unpack(words.T.contiguous(), bits, inputs)  # offset by half of the range
        stored = slow.unpack(zeros, bits, outputs) + (1 << (bits - 1))
        assert torch.equal(stored, torch.full_like(stored, (1 << (bits - 1)) - 1))
        expected = codes.double() * scales.T.double()[:, index.long()]
        with checkpoint.read([name]) as read:
            torch.testing.assert_close(read[name][...].double(), expected, rtol=2e-3, atol=1e-6)


def test_gptq_layout_reads_and_trims_like_the_others(made):
    first = "quantize method=rtn group_size=8 clip=max bits=4 format=gptq"
    folder = made("mixtral", f"{first} + expert_drop score=weight_norm keep=6")
    assert len(open_checkpoint(folder).packed) == 3 * 6 * tiny.LAYERS
    assert bool(logits_of(moe_compress.load(folder, torch.float32)).isfinite().all())
    assert {view.num_experts for view in moe_views(moe_compress.load(folder)).values()} == {6}


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("gpt_oss", "quantize format=gptq group_size=8", "format=gptq packs matrices one by one, but gpt_oss stores"),
        ("mixtral", "quantize bits=auto budget=3 format=gptq", "format=gptq holds one width for all experts"),
        ("mixtral", "quantize bits=auto budget=9", "the mean bits a weight, from 2 to 8, not"),
        ("mixtral", "quantize bits=auto budget=1.5", "the mean bits a weight, from 2 to 8, not"),
        ("mixtral", "quantize bits=auto budget=3 where=all", "shares out bits among experts"),
        ("mixtral", "quantize method=awq experts_at_once=2", "experts_at_once= is for GPTQ"),
        ("mixtral", "prune pattern=2:4 + channels keep=8", "it would not leave 2:4 as it is"),
        ("mixtral", "prune pattern=2:4 + expert_merge keep=6", "it would not leave 2:4 as it is"),
        ("mixtral", "prune allocate=both unseen=dense", "allocate=both keeps a budget"),
    ],
)
def test_what_cannot_be(family, sentence, said, lab, tmp_path):
    assert said in refused(sentence, lab(family), tmp_path)


def test_a_plan_finds_its_tensors_when_edits_change_places(made, lab, tmp_path):
    folder = made("mixtral", "channels keep=16")
    plan = json.loads((folder / "plan.json").read_text())
    plan["stages"][0]["edits"].reverse()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "plan.safetensors").write_bytes((folder / "plan.safetensors").read_bytes())
    options = {k: v for k, v in lab("mixtral").items() if k != "data"}
    applied = moe_compress.apply(tmp_path / "plan.json", out=str(tmp_path / "out"), **options).folder
    torch.testing.assert_close(logits_of(load_model(applied)), logits_of(load_model(folder)))
