"""Quantization from end to end, against naive references in float64, and what every recipe of it must keep to."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moe_compress
import naive_pruning
import naive_quantization as slow
import readers
import tiny
from editing import logits_of
from moe_compress.checkpoints import writer
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward
from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.quantization.grid import rtn
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from test_pruning import moe_layers, refused, report, same_bits, stock, stored, stored_as
from test_resume import Interrupted, counting, leftovers, outcome
from test_trimming_edits import STRANGER, generated, stranger

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")
Options = dict[str, object]
Made = Callable[[str, str], Path]
BITS = (2, 3, 4, 8)
# Experts are 40 wide: words of 3-bit codes then end in the middle of a row, and 8 is the only group for all matrices.
WIDE = 40
# The largest weight sets the scale: searching for a better one takes most of the time.
FEW = "quantize group_size=8 min_tokens=4 clip=max"
BLIND = "quantize method=rtn group_size=8 clip=max"
FUSED = ("gpt_oss", "llama4_text", "granitemoe", "granitemoeshared")  # no matrix of an expert is stored alone
EXPERTS = re.compile(r"experts\.(gate_up|up|down)_proj(_bias)?$")


def wide(family: str, folder: Path, width: int = WIDE) -> Path:
    key = "moe_intermediate_size" if "moe_intermediate_size" in tiny.CONFIGS[family] else "intermediate_size"
    return readers.save_model(family, folder, **{key: width})


@pytest.fixture(scope="session")
def lab(texts, tmp_path_factory) -> Callable[[str], Options]:
    """family -> options whose results all tests on it share."""
    place = tmp_path_factory.mktemp("quantized")
    files = {"data": str(texts / "calibration.txt"), "eval_data": str(texts / "heldout.txt"), "eval": False}
    model = functools.cache(lambda family: str(wide(family, place / "models" / family)))
    return lambda family: {**readers.OPTIONS, **files, "model": model(family), "results": str(place / family)}


@pytest.fixture(scope="session")
def made(lab) -> Made:
    """(family, sentence) -> the checkpoint."""
    return functools.cache(lambda family, sentence: moe_compress.compress(sentence, **lab(family)).folder)


@functools.cache
def ours(folder: Path) -> Any:
    """The checkpoint as this package loads it: what is packed stays so."""
    return moe_compress.load(folder, torch.float32)


def theirs(folder: Path) -> Any:
    """The checkpoint as transformers loads it, with nothing missing and nothing left over."""
    return load_model(folder, torch.float32)


def packed_in(model: Any) -> dict[str, PackedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(experts: int, inputs: int, seed: int) -> Tensor:
    """Rows [experts, tokens, inputs] of many sizes that lie near a space of a third as many dimensions."""
    rows = random(experts, 3 * inputs, inputs // 3, seed=seed) @ random(inputs // 3, inputs, seed=seed + 1)
    return (rows + 0.3 * random(experts, 3 * inputs, inputs, seed=seed + 2)) * random(inputs, seed=seed + 3).exp()


def form(folder: Path) -> str:
    return json.loads((folder / MANIFEST).read_text())["form"]


def require_alike(one: Any, *others: Any) -> None:
    """Models that give the same logits."""
    for other in others:
        torch.testing.assert_close(logits_of(other), logits_of(one), rtol=0, atol=1e-5)


def require_rounded(found: Tensor, weight: Tensor, bits: int, clip: slow.Clip = "mse", least: float = 0.97) -> None:
    """Weights that rounding to the nearest in groups of eight makes; a few scales may be as good as another."""
    expected = slow.dequantized(*slow.rtn(weight, bits, 8, torch.float32, clip)).float()
    assert float(torch.isclose(found, expected, rtol=1e-5).float().mean()) >= least


# --- solvers ---------------------------------------------------------------------------------------------------------


Rounded = tuple[Tensor, Tensor]


def require_same(found: Rounded, expected: Rounded, weight: Tensor, gram: Tensor, often: bool) -> None:
    """The same codes, or as good ones: a tie may fall the other way, and what is behind it in its row with it.

    often: where the largest weight sets the scale, it is a tie itself; of 8 bits, the last is near the arithmetic's.
    """
    same = float((found[0].long() == expected[0]).double().mean())
    new, old = (slow.output_error(weight, slow.dequantized(c, s.double()), gram) for c, s in (found, expected))
    assert found[0].dtype == torch.int8 and same >= (0.96 if often else 0.99)
    assert new == pytest.approx(old, rel=0.05 if often else 0.01)


GRIDS = [(48, 8, torch.float32, "mse"), (40, 40, torch.float32, "max"), (64, 32, torch.bfloat16, "mse")]


@pytest.mark.parametrize(("inputs", "group", "dtype", "clip"), GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_that_of_the_reference(bits, inputs, group, dtype, clip):
    weights, importance = random(2, 12, inputs, seed=1), random(2, inputs, seed=2).exp()
    weights[0, 0], weights[1, 1, :group] = 0, 0
    for weighs in (None, importance):
        codes, scale = rtn(weights, bits, group, dtype, clip, weighs)
        assert scale.dtype == dtype and bool((scale > 0).all()) and bool((codes[weights == 0] == 0).all())
        for b, weight in enumerate(weights):
            expected = slow.rtn(weight, bits, group, dtype, clip, None if weighs is None else weighs[b])
            # Scales as the reference has them: then every code is its code, but for ties.
            again = slow.codes_of(weight.view(-1, group), scale[b].double().flatten(), bits).view(weight.shape)
            tied = ((weight.double() / scale[b].double().repeat_interleave(group, 1)).frac().abs() - 0.5).abs() < 1e-5
            assert torch.equal(codes[b].long()[~tied], again[~tied])
            gram = torch.eye(inputs) if weighs is None or clip == "max" else weighs[b].diag()
            require_same((codes[b], scale[b]), expected, weight, gram, clip == "max" or bits == 8)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("inputs", "group", "dtype", "clip"), GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_gptq_is_that_of_the_paper(bits, inputs, group, dtype, clip, act_order):
    """Gate and up of two experts, which share their inputs; one input is dead, some weights are zero."""
    x, weights = correlated(2, inputs, 3), [random(2, 9, inputs, seed=4), random(2, 12, inputs, seed=5)]
    x[0, :, 3], weights[0][:, :, ::9] = 0, 0
    gram = x.transpose(1, 2) @ x / x.shape[1]
    keywords = {"clip": clip, "act_order": act_order, "damping": 0.02}
    found, raised = gptq(weights, gram, bits, group, dtype, ["a", "b"], **keywords)
    assert raised == [] and bool((found[0][0][:, :, ::9] == 0).all())
    for b in range(2):
        both = torch.cat([weight[b] for weight in weights])
        mine = tuple(torch.cat([part[n][b] for part in found]) for n in range(2))
        assert mine[1].dtype == dtype
        expected = slow.gptq(both, gram[b], bits, group, dtype, **keywords)
        require_same(mine, expected, both, gram[b], clip == "max" or bits == 8)


UNEVEN = [(144, 24), (320, 160), (200, 200), (400, 200)]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_inputs_that_are_always_zero_weigh_nothing(size):
    """Neither on the scales of the others nor on the damping, however large these are."""
    rows = random(200, 64, seed=5) * size
    dead = torch.arange(64) % 8 == 3
    rows[:, dead] = 0
    weight, gram = random(1, 16, 64, seed=6), (rows.T @ rows / len(rows))[None]
    ((codes, scale),), _ = gptq([weight], gram, 3, 32, torch.float32, ["it"])
    ((alone, _),), _ = gptq([weight * ~dead], gram, 3, 32, torch.float32, ["it"])
    live = (codes[..., ~dead] == alone[..., ~dead]).double().mean()
    error = slow.output_error(weight[0], slow.dequantized(codes[0], scale[0].double()), gram[0])
    plain = slow.rtn(weight[0], 3, 32, torch.float32, "mse", gram[0].diagonal())
    assert float(live) > 0.9 and error < slow.output_error(weight[0], slow.dequantized(*plain), gram[0])


@pytest.mark.parametrize(("inputs", "group"), UNEVEN)
def test_groups_that_fit_no_block(inputs, group):
    x, weight = correlated(1, inputs, 6), random(1, 6, inputs, seed=7)
    gram = x.transpose(1, 2) @ x / x.shape[1]
    ((codes, scale),), _ = gptq([weight], gram, 3, group, torch.float32, ["it"])
    expected = slow.gptq(weight[0], gram[0], 3, group, torch.float32)
    require_same((codes[0], scale[0]), expected, weight[0], gram[0], often=False)


@pytest.mark.parametrize("bits", [2, 3])
def test_making_up_for_rounding_pays(bits):
    x, weights = correlated(4, 64, 8), random(4, 16, 64, seed=9)
    gram = x.transpose(1, 2) @ x / x.shape[1]
    (solved,), _ = gptq([weights], gram, bits, 16, torch.float32, list("abcd"))
    rounded = rtn(weights, bits, 16, torch.float32, "mse")
    for b, weight in enumerate(weights):
        pair = [slow.dequantized(codes[b].long(), scale[b]) for codes, scale in (solved, rounded)]
        new, old = (slow.output_error(weight, each, gram[b]) for each in pair)
        assert new < 0.8 * old


def test_damping_is_raised_once_and_said():
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[1, 0, 0] = -0.05  # not definite with a damping of 0.01, definite with 0.1
    assert gptq([random(3, 4, 8)], gram, 4, 8, torch.float32, ["a", "b", "c"])[1] == [1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5.0])
def test_a_gram_matrix_that_nothing_saves(wrong):
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[2, 4, 4] = wrong
    names = [f"expert {e} of layer 7" for e in range(3)]
    with pytest.raises(ValueError, match="the Gram matrix of expert 2 of layer 7 is singular or holds NaN"):
        gptq([random(3, 4, 8)], gram, 4, 8, torch.float32, names)


# --- every family ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_experts_are_quantized_and_nothing_else(family, lab, made):
    """As this package loads it, as transformers does, and the original with what the codes stand for in its place."""
    model, folder = Path(str(lab(family)["model"])), made(family, f"{FEW} bits=3")
    assert form(folder) == ("edited" if family in FUSED else "plain")
    before, here, there = stock(model), ours(folder), theirs(folder)
    fake, layers, (low, high) = copy.deepcopy(before), moe_layers(model, family), slow.limits(3)
    assert len(packed_in(here)) == len(layers) * tiny.EXPERTS * (2 if family == "nemotron_h" else 3) > 0
    for layer in layers:
        view, loaded = moe_views(here)[layer], naive_pruning.matrices(fake, family, layer)
        for expert, matrices in zip(view.experts.separate, loaded, strict=True):
            for module, matrix in zip(expert.values(), matrices, strict=True):
                codes = module.codes().long()
                assert (module.bits, module.group) == (3, 8) and low <= int(codes.min()) < int(codes.max()) <= high
                matrix.copy_(slow.dequantized(codes, module.scales.double()))  # a view onto the weights
        if family not in FUSED:
            for one, other in zip(loaded, naive_pruning.matrices(there, family, layer), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    old, new = before.state_dict(), here.state_dict()
    kept = {name for name in old if not EXPERTS.search(name)}
    assert {name for name in new if ".separate." not in name} == kept
    assert all(same_bits(new[name], old[name]) for name in kept)
    require_alike(fake, here, there)
    said = report(folder)
    assert (said["quantized"], said["bits"], said["skipped"]) == ({"experts": 1.0}, {"experts": 3.0}, [])
    few = {i: [e for e, count in enumerate(each) if count < 4] for i, each in said["tokens"].items()}
    assert len(few) == len(layers) and said["unseen"] == {i: found for i, found in few.items() if found}


def grid() -> list[Any]:
    """Every method, width and family; one in the default run, the others when asked."""
    found = itertools.product(tiny.EDITABLE, ("rtn", "gptq", "awq"), BITS)
    quick = ("mixtral",)
    return [pytest.param(*each, marks=() if each[0] in quick else pytest.mark.slow) for each in found]


@pytest.mark.parametrize(("family", "method", "bits"), grid())
def test_every_method_and_width_of_every_family(family, method, bits, lab, made):
    """Stock transformers gives the logits that the packed checkpoint does, which are near the original's."""
    folder = made(family, f"quantize method={method} bits={bits} group_size=8 min_tokens=1 clip=max")
    packed = packed_in(ours(folder))
    assert packed and {module.bits for module in packed.values()} == {bits}
    require_alike(ours(folder), theirs(folder))
    expected, found = logits_of(moe_compress.load(str(lab(family)["model"]), torch.float32)), logits_of(ours(folder))
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {2: 1.5, 3: 1.0, 4: 0.6, 8: 0.2}[bits]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_dense_is_the_same_in_plain_numbers(family, lab, made):
    folder, model = made(family, f"{FEW} bits=3 format=dense"), lab(family)["model"]
    before, after = stored(model), stored(folder)
    assert form(folder) == "plain" and "quantization_config" not in (folder / "config.json").read_text()
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    require_alike(stock(folder), ours(made(family, f"{FEW} bits=3")))


@pytest.mark.parametrize(("family", "bits"), [("mixtral", 2), ("mixtral", 8), ("gpt_oss", 4)])
def test_rounded_experts_are_those_of_the_reference(family, bits, lab, made):
    folder = made(family, f"quantize method=rtn group_size=8 bits={bits}")
    here, old = ours(folder), naive_pruning.matrices(stock(lab(family)["model"]), family, 1)[5]
    assert {module.bits for module in packed_in(here).values()} == {bits}
    for weight, stack in zip(old, moe_views(here)[1].stacks().values(), strict=True):
        require_rounded(stack[5], weight, bits)
    require_alike(here, theirs(folder))


def test_three_bits_of_a_narrow_matrix(reader_folder, lab, tmp_path):
    options = {**lab("mixtral"), "model": str(reader_folder("mixtral")), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{BLIND} bits=3", **options).folder
    require_alike(ours(folder), theirs(folder))


def test_edited_checkpoints_load_where_the_package_is_unknown(made, tmp_path):
    """Packed ones, and one that is packed under stock names and edited besides."""
    uneven = f"{BLIND} + expert_drop score=weight_norm keep=4 budget=global"
    folders = {"gpt_oss": str(made("gpt_oss", f"{FEW} bits=3")), "mixtral": str(made("mixtral", uneven))}
    models = {family: theirs(Path(folder)) for family, folder in folders.items()}
    expected = {family: logits_of(model) for family, model in models.items()}
    expected |= {f"{family} generated": generated(model) for family, model in models.items()}
    save_file(expected, tmp_path / "expected.safetensors")
    ids = json.dumps([tiny.token_ids().tolist(), tiny.token_ids(2, 18).tolist()])
    words = (json.dumps(folders), str(tmp_path / "expected.safetensors"), ids)
    done = stranger("-c", STRANGER, *words, home=tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2"]


@pytest.mark.parametrize(("stored_in", "computed_in"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_scales_have_the_dtype_of_the_checkpoint_and_the_rest_its_bits(stored_in, computed_in, lab, tmp_path):
    dtype, model = getattr(torch, stored_in), stored_as("mixtral", tmp_path / "model", getattr(torch, stored_in))
    options = {**lab("mixtral"), "model": str(model), "out": str(tmp_path / "out"), "dtype": computed_in}
    folder = moe_compress.compress(FEW, **options).folder
    before, after = stored(model), stored(folder)
    assert all(same_bits(after[name], tensor) for name, tensor in before.items() if ".experts." not in name)
    assert {tensor.dtype for name, tensor in after.items() if name.endswith("_scale")} == {dtype}
    here, there = moe_compress.load(folder), load_model(folder)
    assert here.dtype == there.dtype == dtype
    for layer, view in moe_views(here).items():
        loaded, found = there.model.layers[layer].mlp.experts, view.stacks()
        assert torch.equal(torch.cat([found["gate"], found["up"]], 1), loaded.gate_up_proj)
        assert torch.equal(found["down"], loaded.down_proj)


def test_a_quantized_checkpoint_is_evaluated(lab, options):
    found = moe_compress.compress(BLIND, **{**options, "model": lab("mixtral")["model"]})
    resident = moe_compress.evaluate(found.folder, **{**options, "resident": True})
    one, other = (result.record.model_dump() for result in (found, resident))
    assert one["metrics"] and one["metrics"].keys() == other["metrics"].keys()
    assert found.record.sizes["bytes"] < 0.5 * found.original.sizes["bytes"]


# --- other parts of a layer ------------------------------------------------------------------------------------------


ATTENTION, DENSE = r"self_attn\.\w*(proj\w*)\.weight", r"layers\.0\.mlp\.(gate|up|down)_proj\.weight"
ONE, SHARED = r"experts\.\d+\.\w+\.weight", r"shared_experts?\..*weight"
PARTS: list[Any] = [
    ("deepseek_v3", "where=all", rf"{ONE}|{SHARED}|{ATTENTION}|{DENSE}"),
    ("qwen2_moe", "where=all,router spare=attention,router", rf"{ONE}|{SHARED}"),
    ("mixtral", "where=experts,attention", rf"{ONE}|{ATTENTION}"),
    ("gpt_oss", "where=attention", ATTENTION),
    ("deepseek_v3", "where=shared,dense", rf"{SHARED}|{DENSE}"),
    ("mixtral", "where=attention", ATTENTION),
]


@pytest.mark.parametrize(("family", "words", "pattern"), PARTS)
def test_where_says_what_is_quantized(family, words, pattern, lab, made):
    """Which tensors are packed, that all others are what they were, and that stock loads the checkpoint."""
    folder, before = made(family, f"{BLIND} {words}"), stored(lab(family)["model"])
    names, after, here = {name for name in before if re.search(pattern, name)}, stored(folder), ours(folder)
    assert names and (form(folder) == "edited" or set(open_checkpoint(folder).packed) == names)
    assert form(folder) == "plain" or ONE not in pattern
    assert all(same_bits(after[name], before[name]) for name in before.keys() - names)
    assert len(packed_in(here)) == len(names) and {module.group for module in packed_in(here).values()} == {8}
    require_alike(here, theirs(folder))


def test_other_parts_of_edited_checkpoints(lab, made):
    here, whole = ours(made("llama4_text", f"{FEW} where=all")), stock(lab("llama4_text")["model"])
    linear = {name for name, module in whole.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.removeprefix("model.layers.") for name in packed_in(here) if ".separate." not in name}
    assert found == {name for name in linear if not name.endswith("router")}
    require_alike(here, stock(made("llama4_text", f"{FEW} where=all format=dense")))


ROUTERS: list[Any] = [
    ("deepseek_v3", "where=all,router", r"mlp\.gate\.weight$"),
    ("mixtral", "where=router", r"gate\.weight$"),
    ("qwen2_moe", "where=experts,router", r"mlp\.(gate|shared_expert_gate)\.weight$"),
    ("gpt_oss", "where=experts,router", r"router\.weight$"),
]


@pytest.mark.parametrize(("family", "words", "pattern"), ROUTERS)
def test_routers_are_rounded_and_stored_as_plain_numbers(family, words, pattern, lab, made):
    folder, before = made(family, f"{BLIND} {words}"), stored(lab(family)["model"])
    after, names = stored(folder), [name for name in before if re.search(pattern, name)]
    assert names
    for name in names:
        require_rounded(after[name], before[name], 4, "max", 0.85)  # the largest weight of a group is a tie
    said = report(folder)["routing_change"]
    assert sorted(map(int, said)) == moe_layers(lab(family)["model"], family)
    assert all(layer["kl"] > 0 and 0 < layer["overlap"] <= 1 for layer in said.values())
    require_alike(ours(folder), theirs(folder))


# --- how many inputs share a scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        ("", {"w_switch": 8, "w_down": 8}),
        ("format=packed", {"w_switch": 32, "w_down": 40}),
        ("group_size=16 format=packed", {"w_switch": 16, "w_down": 10}),
        ("group_size=0", {"w_switch": 32, "w_down": 40}),
    ],
)
def test_the_largest_group_that_divides_the_widths(words, groups, made):
    folder = made("mixtral", f"quantize method=rtn clip=max {words}")
    for part, group in groups.items():
        found = [module.group for name, module in packed_in(ours(folder)).items() if name.endswith(part)]
        assert found == [group] * tiny.LAYERS * tiny.EXPERTS
    require_alike(ours(folder), theirs(folder))


@pytest.fixture(scope="session")
def odd(lab, tmp_path_factory) -> Options:
    """Options for a model whose down projections have 20 inputs, of which no group from 8 up to 16 is left."""
    return {**lab("mixtral"), "model": str(wide("mixtral", tmp_path_factory.mktemp("odd") / "model", 20))}


@pytest.mark.parametrize("format", ["packed", "dense", "auto"])
def test_a_width_that_no_group_fits_is_left_as_it_is(format, odd, tmp_path):
    folder = moe_compress.compress(f"{FEW} format={format}", **{**odd, "out": str(tmp_path / "out")}).folder
    for layer, view in moe_views(ours(folder)).items():
        for e, old in enumerate(naive_pruning.matrices(stock(odd["model"]), "mixtral", layer)):
            assert torch.equal(old[2], view.stacks()["down"][e]) and not torch.equal(old[0], view.stacks()["gate"][e])
    said = report(folder)
    assert said["quantized"] == pytest.approx({"experts": 2 / 3})
    assert sorted(said["skipped"]) == [f"mlp.experts.down of layer {i}" for i in range(3)]
    assert len(packed_in(ours(folder))) == (0 if format == "dense" else 2 * tiny.LAYERS * tiny.EXPERTS)


def test_one_group_for_all_is_asked_for_before_anything_is_read(odd, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    said = refused("quantize format=compressed-tensors", odd, tmp_path)
    assert "no group of 8 and more divides all widths" in said and not calls


# --- with other stages -----------------------------------------------------------------------------------------------


def pieces(folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """(layer, expert) -> what is stored of the expert, by the rest of the name."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in stored(folder).items():
        if place := re.search(r"layers\.(\d+)\..*experts\.(?:separate\.)?(\d+)\.(.*)", name):
            found.setdefault((place[1], int(place[2])), {})[place[3]] = tensor
    return found


def same_parts(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


DROPS = [("mixtral", "keep=6"), ("mixtral", "keep=4 budget=global"), ("gpt_oss", "keep=4 novice=mean")]


@pytest.mark.parametrize(("family", "words"), DROPS)
def test_dropping_experts_moves_the_bytes_of_the_others(family, words, made):
    score = "reap" if "novice" in words else "weight_norm"
    folder = made(family, f"{BLIND} + expert_drop score={score} {words}")
    before, after = pieces(made(family, BLIND)), pieces(folder)
    edits = json.loads((folder / "plan.json").read_text())["stages"][-1]["edits"]
    assert sum(len(edit["experts"]) for edit in edits) == len(after)
    for edit in edits:
        layer = str(edit["layer"])
        assert all(same_parts(before[layer, old], after[layer, new]) for new, old in enumerate(edit["experts"]))
    assert len(open_checkpoint(folder).packed) in (0, 3 * len(after))
    require_alike(ours(folder), theirs(folder))


OTHERS: list[Any] = [
    ("mixtral", BLIND, "identity"),
    ("mixtral", BLIND, "layer_drop layers=1"),
    ("mixtral", BLIND, "block_drop layers=1"),
    ("gpt_oss", BLIND, "block_drop layers=1"),
    ("deepseek_v3", f"{BLIND} where=all", "layer_drop layers=1 part=attention"),
    ("deepseek_v3", f"{BLIND} where=all", "layer_drop layers=1"),
]


@pytest.mark.parametrize(("family", "first", "second"), OTHERS)
def test_what_stays_keeps_its_bytes(family, first, second, made):
    one, folder = stored(made(family, first)), made(family, f"{first} + {second}")
    if "block" in second:
        one = {name.replace("layers.2.", "layers.1."): t for name, t in one.items() if "layers.1." not in name}
    moved = stored(folder)
    filled = moved.keys() - one.keys()
    assert all("norm" in name or not bool(moved[name].count_nonzero()) for name in filled)
    assert all(same_bits(moved[name], one[name]) for name in moved.keys() - filled)
    assert len(moved.keys() - filled) >= (0.6 if "layer_drop" in second else 1) * len(one)
    require_alike(ours(folder), theirs(folder))


BEFORE = [
    ("mixtral", "expert_drop score=weight_norm keep=6 budget=global", "edited"),
    ("gpt_oss", "expert_drop keep=4 novice=mean", "edited"),
]


@pytest.mark.parametrize(("family", "before", "kind"), BEFORE)
def test_quantizing_after_other_stages(family, before, kind, made):
    folder, fake = made(family, f"{before} + {FEW}"), theirs(made(family, f"{before} + {FEW} format=dense"))
    assert form(folder) == kind
    assert len(packed_in(ours(folder))) == sum(3 * view.num_experts for view in moe_views(fake).values())
    require_alike(fake, ours(folder), theirs(folder))


@pytest.mark.parametrize(("family", "words"), [("mixtral", FEW), ("gpt_oss", BLIND)])
def test_zeros_of_pruning_stay(family, words, made):
    first = "prune method=magnitude pattern=2:4"
    pruned, folder = made(family, first), made(family, f"{first} + {words} bits=3")
    for layer, view in moe_views(ours(folder)).items():
        for e, old in enumerate(naive_pruning.matrices(stock(pruned), family, layer)):
            for weight, stack in zip(old, view.stacks().values(), strict=True):
                assert bool((stack[e][weight == 0] == 0).all())
    assert report(folder)["zeros"]["experts"] >= 0.5


LATER = "put this stage before the one that made them so"
REFUSED: list[Any] = [
    ("mixtral", "prune method=magnitude", LATER),
    ("gpt_oss", "prune method=sparsegpt pattern=2:4", LATER),
    ("mixtral", BLIND, LATER),
    ("gpt_oss", FEW, LATER),
    ("mixtral", "expert_merge keep=4", "have to be alike"),
    ("gpt_oss", "channels keep=16", "have to be alike"),
]


@pytest.mark.parametrize(("family", "second", "said"), REFUSED)
def test_packed_weights_do_not_change_any_more(family, second, said, lab, made, monkeypatch, tmp_path):
    folder, calls = made(family, BLIND), counting(monkeypatch, forward.hf, "run_layer")
    sentence = refused(f"{BLIND} + {second}", lab(family), tmp_path)
    assert sentence.startswith(f"stage 2 ({second.split()[0]}): ") and said in sentence
    assert said in refused(second, {**lab(family), "model": str(folder)}, tmp_path) and not calls


ASIDE: list[Any] = [
    ("mixtral", BLIND, f"{BLIND} where=attention"),
    ("mixtral", BLIND, "prune where=attention"),
    ("gpt_oss", BLIND, "prune where=attention"),
    ("gpt_oss", f"{BLIND} where=attention", "prune"),
]


@pytest.mark.parametrize(("family", "first", "second"), ASIDE)
def test_what_is_packed_outlasts_a_stage_on_other_parts(family, first, second, made):
    """Either refused, or what is packed keeps its bytes and the result loads."""
    try:
        folder = made(family, f"{first} + {second}")
    except ValueError as error:
        assert "packed" in str(error)
        return
    before, after = stored(made(family, first)), stored(folder)
    packed = {name for name in before if name.endswith(("_packed", "_scale", ".words", ".scales"))}
    assert packed and packed <= after.keys() and all(same_bits(before[name], after[name]) for name in packed)
    require_alike(ours(folder), theirs(folder))


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq"}
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": True}
TARGETS = {"targets": ["re:.*experts.*"]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
PACKED |= {"config_groups": {"experts": {**TARGETS, "weights": GROUP}}}


def grouped(**change: Any) -> dict[str, Any]:
    return {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, **change}}}}


ZERO = {"model.layers.0.it.weight_zero_point": torch.zeros(1)}
CONFIGS: list[Any] = [
    (GPTQ, {}, "is stored in gptq format, which is not read with sym=False: use a bf16 or fp32 copy"),
    ({**GPTQ, "sym": True, "desc_act": True}, {}, "is stored in gptq format, which is not read with desc_act=True"),
    ({"quant_method": "fp8"}, {}, "is stored in fp8 format, which is not read"),
    ({**PACKED, "format": "float-quantized"}, {}, "is stored in compressed-tensors float-quantized format, which is"),
    ({**PACKED, "config_groups": {}}, {}, "whose config_groups are missing"),
    (
        {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, "num_bits": None}}}},
        {},
        "group 'a' lacks num_bits",
    ),
    (
        {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, "symmetric": False}}}},
        {},
        "not read with zero",
    ),
    (
        {**PACKED, "config_groups": {"a": {**TARGETS, "weights": {**GROUP, "group_size": None}}}},
        {},
        "no strategy and gro",
    ),
    ({**GPTQ, "sym": True, "group_size": 8, "dynamic": {"+:.*": {"bits": 8}}}, {}, "settings of their own for +:.*"),
    (PACKED, ZERO, "model.layers.0.it is packed with weight_zero_point, which is not read: use a bf16 copy, or symm"),
    (PACKED, {"model.layers.0.it.weight_packed": torch.zeros(1)}, "weight_scale is missing beside model.layers.0.it"),
]


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint in one file, after a change of its tensors or its config."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors, values = dict(stored(folder)), json.loads((folder / "config.json").read_text())
    change(tensors, values)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(values))
    return out


def _ending(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def _other_groups(tensors, _values):
    tensors[_ending(tensors, ".weight_scale")] = tensors[_ending(tensors, ".weight_scale")][:, :1]


def _other_bits(_tensors, values):
    values["quantization_config"]["config_groups"]["experts"]["weights"]["num_bits"] = 8


def _nothing_said(_tensors, values):
    del values["quantization_config"]


def _nan(tensors, _values):
    tensors[_ending(tensors, ".weight_scale")][0, 0] = torch.nan


def _zero_points(tensors, _values):
    tensors[_ending(tensors, ".qzeros")][0, 0] = 0


def _order(tensors, _values):
    index = tensors[_ending(tensors, ".g_idx")]
    index[0] = index[-1]


def _no_edits(_tensors, values):
    del values["moe_compress"]["edits"]


DAMAGES: list[Any] = [
    ("", _other_groups, "has scales .* as config.json says"),
    ("", _other_bits, "that is not 8 bits in groups of 8"),
    ("", _nothing_said, "is packed, but config.json has no quantization_config"),
    ("", _nan, "NaN or infinity"),
    ("format=gptq", _zero_points, "has zero points"),
    ("format=gptq", _order, "order of their own"),
    ("format=packed", _no_edits, "lacks moe_compress.edits"),
]


@pytest.mark.parametrize(("words", "change", "said"), DAMAGES)
def test_damaged_checkpoints_are_refused(words, change, said, made, tmp_path):
    folder = damaged(made("mixtral", f"{BLIND} {words}"), tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=said):
        moe_compress.load(folder)


@pytest.mark.parametrize(("config", "more", "said"), CONFIGS)
def test_other_formats_are_not_read(config, more, said, lab, tmp_path):
    model = Path(str(lab("mixtral")["model"]))
    values = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    save_file({**stored(model), **more}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(said)):
        open_checkpoint(tmp_path)


# --- the same again, and experts that see too little -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "place", "function", "number", "left"),
    [
        ("mixtral", forward.hf, "run_layer", 3, 2),
        ("mixtral", writer, "write_shard", 2, 2),
        ("gpt_oss", writer, "write_shard", 3, 1),
    ],
)
def test_a_stopped_run_goes_on(family, place, function, number, left, lab, made, monkeypatch, tmp_path):
    options = {**lab(family), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, function, stop_at=number)
        moe_compress.compress(f"{FEW} bits=3", **options)
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(f"{FEW} bits=3", **options).folder
    assert len(layers) == 2 * left and len(written) == left
    assert outcome(folder) == outcome(made(family, f"{FEW} bits=3")) and leftovers(tmp_path) == []


AT_ONCE = [("mixtral", "propagate=original"), ("deepseek_v3", "where=all act_order=true unseen=pooled shrink=8")]


@pytest.mark.parametrize(("family", "words"), AT_ONCE)
def test_a_few_experts_at_a_time_or_all_at_once(family, words, made):
    folder, other = made(family, f"{FEW} {words}"), made(family, f"{FEW} {words} experts_at_once=3")
    one, parts = (torch.cat([m.codes().flatten() for m in packed_in(ours(f)).values()]) for f in (folder, other))
    assert float((one == parts).double().mean()) > 0.995
    first, second = report(folder), report(other)
    assert all(first[key] == second[key] for key in ("tokens", "unseen", "quantized", "bits", "damping_raised"))


LONELY = 3


@pytest.fixture(scope="session")
def lonely(lab, tmp_path_factory) -> Options:
    """Options for a model whose expert LONELY of layer 0 is never chosen."""
    folder = readers.save_lonely(tmp_path_factory.mktemp("lonely") / "model", LONELY)
    return {**lab("gpt_oss"), "model": str(folder)}


@pytest.mark.parametrize("policy", ["rtn", "pooled"])
def test_an_expert_without_tokens(policy, lonely, tmp_path):
    words = f"quantize group_size=8 min_tokens=1 propagate=original unseen={policy}"
    folder = moe_compress.compress(words, **{**lonely, "out": str(tmp_path / "out")}).folder
    said, found = report(folder), moe_views(ours(folder))[0].stacks()
    assert said["unseen"] == {"0": [LONELY]} and said["tokens"]["0"][LONELY] == 0
    assert [len(each) for each in said["tokens"].values()] == [tiny.EXPERTS] * tiny.LAYERS
    assert {sum(each) for each in said["tokens"].values()} == {tiny.TOP_K * said["calibration"]["tokens"]}
    before = naive_pruning.matrices(stock(lonely["model"]), "gpt_oss", 0)[LONELY]
    for old, new in zip(before, found.values(), strict=True):
        assert float((new[LONELY] == 0).float().mean()) < 0.3
        if policy == "rtn":
            require_rounded(new[LONELY], old, 4)
        else:
            with pytest.raises(AssertionError):
                require_rounded(new[LONELY], old, 4)


def test_an_expert_without_tokens_can_be_an_error(lonely, tmp_path):
    said = refused("quantize min_tokens=1 unseen=error", lonely, tmp_path)
    assert said.startswith(f"expert {LONELY} of layer 0: fewer than 1 tokens of the calibration text")


def test_the_error_names_values_that_quantize_has(lonely, tmp_path):
    assert "magnitude" not in refused("quantize min_tokens=1 unseen=error", lonely, tmp_path)


# --- what a user can get wrong, and what is foretold -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("mixtral", "quantize bits=5", "quantize.bits=5: allowed: 2, 3, 4, 8, auto."),
        ("mixtral", "quantize bits=auto", "bits=auto needs budget=, the mean bits a weight, from 2 to 8."),
        ("mixtral", "quantize budget=3", "budget=3.0 shares out bits=auto; bits=4 are the same everywhere."),
        ("mixtral", "quantize group_size=-1", "group_size=-1: the inputs that share a scale are 0 (a whole row) or 8"),
        ("mixtral", "quantize group_size=4", "group_size=4: the inputs that share a scale are 0 (a whole row) or 8"),
        ("mixtral", "quantize damping=0", "damping=0.0: a share of the mean of the diagonal, above 0, is needed."),
        ("mixtral", "quantize damping=nan", "damping=nan: a share of the mean of the diagonal"),
        ("mixtral", "quantize method=rtn act_order=true", "act_order=true is GPTQ's, and method=rtn goes through no"),
        ("mixtral", "quantize method=foo", "quantize.method=foo: allowed: rtn, gptq, awq."),
        ("mixtral", "quantize format=foo", "quantize.format=foo: allowed: auto, compressed-tensors"),
        ("mixtral", "quantize unseen=magnitude", "quantize.unseen=magnitude: allowed: rtn, pooled, error."),
        ("mixtral", "quantize experts_at_once=-1", "experts_at_once=-1 min_tokens=32: counts from 0 (all) and from 1"),
        ("gpt_oss", "quantize format=compressed-tensors", "gpt_oss stores mlp.experts.gate of layer 0 together with"),
        ("jetmoe", "quantize method=rtn", "experts of jetmoe cannot be changed"),
        ("jetmoe", "quantize", "experts of jetmoe cannot be changed"),
        ("mixtral", "expert_drop keep=4 + quantize group_size=4", "stage 2 (quantize): group_size=4: the inputs"),
    ],
)
def test_what_cannot_be_quantized(family, sentence, said, lab, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    assert said in refused(sentence, lab(family), tmp_path)
    assert not calls


def test_no_plan_holds_quantized_weights(lab, made, tmp_path):
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="its stage quantize changes weights, which no plan holds: run the recipe"):
        moe_compress.apply(made("mixtral", BLIND) / "plan.json", **options)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("mixtral", BLIND),
        ("mixtral", f"{FEW} bits=3 format=dense"),
        ("mixtral", f"{BLIND} + expert_drop score=weight_norm keep=4 budget=global"),
        ("deepseek_v3", f"{BLIND} where=all"),
        ("gpt_oss", f"{FEW} bits=3"),
        ("mixtral", "quantize method=rtn clip=max group_size=0"),
    ],
)
def test_a_forecast_says_how_small_the_files_get(family, sentence, lab, made):
    found, written = moe_compress.plan(sentence, **lab(family)), open_checkpoint(made(family, sentence))
    assert found.after.bytes == pytest.approx(written.bytes, rel=0.02)
    assert found.after.bytes < 0.6 * found.before.bytes or "dense" in sentence
    again = moe_compress.plan("top_k k=1", **{**lab(family), "model": str(written.folder)})
    assert again.before.bytes == pytest.approx(written.bytes, rel=0.02)
