"""Quantization from end to end, on every family and part of a layer, against naive references."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward
from moe_compress.models.moe import all_moe_views, moe_views
from support import naive_pruning, tiny
from support import naive_quantization as slow
from support.editing import logits_of
from support.interrupted import counting
from support.pruned import moe_layers, refused, report, same_bits, stock, stored, stored_as
from support.quantized import (
    BITS,
    BLIND,
    EXPERTS,
    FEW,
    FUSED,
    Options,
    form,
    ours,
    packed_in,
    require_alike,
    require_rounded,
    theirs,
    wide,
)
from support.slow import each_once, slow_after, slow_families, slow_unless
from support.stock_process import STRANGER, generated, stranger

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


@torch.no_grad()
@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_experts_are_quantized_and_nothing_else(family, wide_lab, wide_made):
    """As this package loads it, as transformers does, and the original with what the codes stand for in its place."""
    model, folder = Path(str(wide_lab(family)["model"])), wide_made(family, f"{FEW} bits=3")
    assert form(folder) == ("edited" if family in FUSED else "plain")
    before, here, there = stock(model), ours(folder), theirs(folder)
    fake, layers, (low, high) = copy.deepcopy(before), moe_layers(model, family), slow.limits(3)
    assert len(packed_in(here)) == len(layers) * tiny.EXPERTS * (2 if family == "nemotron_h" else 3) > 0
    for layer in layers:
        view, loaded = all_moe_views(here)[layer], naive_pruning.matrices(fake, family, layer)
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
    """Every method, width and family; of one family every method and every width in the default run."""
    axes = ("mixtral",), ("rtn", "gptq", "awq"), BITS
    return slow_unless(each_once(*axes), tiny.EDITABLE, *axes[1:])


@pytest.mark.parametrize(("family", "method", "bits"), grid())
def test_every_method_and_width_of_every_family(family, method, bits, wide_lab, wide_made):
    """Stock transformers gives the logits that the packed checkpoint does, which are near the original's."""
    few = "" if method == "rtn" else " min_tokens=1"
    folder = wide_made(family, f"quantize method={method} bits={bits} group_size=8 clip=max{few}")
    packed = packed_in(ours(folder))
    assert packed and {module.bits for module in packed.values()} == {bits}
    require_alike(ours(folder), theirs(folder))
    expected, found = (
        logits_of(moe_compress.load(str(wide_lab(family)["model"]), torch.float32)),
        logits_of(ours(folder)),
    )
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {2: 1.5, 3: 1.0, 4: 0.6, 8: 0.2}[bits]


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "gpt_oss", "llama4_text"]))
def test_dense_is_the_same_in_plain_numbers(family, wide_lab, wide_made):
    folder, model = wide_made(family, f"{FEW} bits=3 format=dense"), wide_lab(family)["model"]
    before, after = stored(model), stored(folder)
    assert form(folder) == "plain" and "quantization_config" not in (folder / "config.json").read_text()
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    require_alike(stock(folder), ours(wide_made(family, f"{FEW} bits=3")))


@pytest.mark.parametrize(("family", "bits"), slow_after(1, [("mixtral", 2), ("mixtral", 8), ("gpt_oss", 4)]))
def test_rounded_experts_are_those_of_the_reference(family, bits, wide_lab, wide_made):
    folder = wide_made(family, f"quantize method=rtn group_size=8 bits={bits}")
    here, old = ours(folder), naive_pruning.matrices(stock(wide_lab(family)["model"]), family, 1)[5]
    assert {module.bits for module in packed_in(here).values()} == {bits}
    for weight, stack in zip(old, moe_views(here)[1].stacks().values(), strict=True):
        require_rounded(stack[5], weight, bits)
    require_alike(here, theirs(folder))


def test_three_bits_of_a_narrow_matrix(reader_folder, wide_lab, tmp_path):
    options = {**wide_lab("mixtral"), "model": str(reader_folder("mixtral")), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{BLIND} bits=3", **options).folder
    require_alike(ours(folder), theirs(folder))


@pytest.mark.slow  # test_a_good_checkpoint_is_verified, in a fresh stock process
def test_edited_checkpoints_load_where_the_package_is_unknown(wide_made, tmp_path):
    """Packed ones, and one that is packed under stock names and edited besides."""
    uneven = f"{BLIND} + expert_drop score=weight_norm keep=4 budget=global"
    folders = {"gpt_oss": str(wide_made("gpt_oss", f"{FEW} bits=3")), "mixtral": str(wide_made("mixtral", uneven))}
    models = {family: theirs(Path(folder)) for family, folder in folders.items()}
    expected = {family: logits_of(model) for family, model in models.items()}
    expected |= {f"{family} generated": generated(model) for family, model in models.items()}
    save_file(expected, tmp_path / "expected.safetensors")
    ids = json.dumps([tiny.token_ids().tolist(), tiny.token_ids(2, 18).tolist()])
    words = (json.dumps(folders), str(tmp_path / "expected.safetensors"), ids)
    done = stranger("-c", STRANGER, *words, home=tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2"]


@pytest.mark.parametrize(
    ("stored_in", "computed_in"), slow_after(1, [("bfloat16", "float32"), ("float32", "bfloat16")])
)
def test_scales_have_the_dtype_of_the_checkpoint_and_the_rest_its_bits(stored_in, computed_in, wide_lab, tmp_path):
    dtype, model = getattr(torch, stored_in), stored_as("mixtral", tmp_path / "model", getattr(torch, stored_in))
    options = {**wide_lab("mixtral"), "model": str(model), "out": str(tmp_path / "out"), "dtype": computed_in}
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


def test_a_quantized_checkpoint_is_evaluated(wide_lab, options):
    found = moe_compress.compress(BLIND, **{**options, "model": wide_lab("mixtral")["model"]})
    resident = moe_compress.evaluate(found.folder, **{**options, "resident": True})
    one, other = (result.record.model_dump() for result in (found, resident))
    assert one["metrics"] and one["metrics"].keys() == other["metrics"].keys()
    assert found.record.sizes["bytes"] < 0.5 * found.original.sizes["bytes"]


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


@pytest.mark.parametrize(("family", "words", "pattern"), slow_after(2, PARTS))
def test_where_says_what_is_quantized(family, words, pattern, wide_lab, wide_made):
    """Which tensors are packed, that all others are what they were, and that stock loads the checkpoint."""
    folder, before = wide_made(family, f"{BLIND} {words}"), stored(wide_lab(family)["model"])
    names, after, here = {name for name in before if re.search(pattern, name)}, stored(folder), ours(folder)
    assert names and (form(folder) == "edited" or set(open_checkpoint(folder).packed) == names)
    assert form(folder) == "plain" or ONE not in pattern
    assert all(same_bits(after[name], before[name]) for name in before.keys() - names)
    assert len(packed_in(here)) == len(names) and {module.group for module in packed_in(here).values()} == {8}
    require_alike(here, theirs(folder))


def test_other_parts_of_edited_checkpoints(wide_lab, wide_made):
    here, whole = ours(wide_made("llama4_text", f"{FEW} where=all")), stock(wide_lab("llama4_text")["model"])
    linear = {name for name, module in whole.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.removeprefix("model.layers.") for name in packed_in(here) if ".separate." not in name}
    assert found == {name for name in linear if not name.endswith("router")}
    require_alike(here, stock(wide_made("llama4_text", f"{FEW} where=all format=dense")))


ROUTERS: list[Any] = [
    ("deepseek_v3", "where=all,router", r"mlp\.gate\.weight$"),
    ("mixtral", "where=router", r"gate\.weight$"),
    ("qwen2_moe", "where=experts,router", r"mlp\.(gate|shared_expert_gate)\.weight$"),
    ("gpt_oss", "where=experts,router", r"router\.weight$"),
]


@pytest.mark.parametrize(("family", "words", "pattern"), slow_after(1, ROUTERS))
def test_routers_are_rounded_and_stored_as_plain_numbers(family, words, pattern, wide_lab, wide_made):
    folder, before = wide_made(family, f"{BLIND} {words}"), stored(wide_lab(family)["model"])
    after, names = stored(folder), [name for name in before if re.search(pattern, name)]
    assert names
    for name in names:
        require_rounded(after[name], before[name], 4, "max", 0.85)  # the largest weight of a group is a tie
    said = report(folder)["routing_change"]
    assert sorted(map(int, said)) == moe_layers(wide_lab(family)["model"], family)
    assert all(layer["kl"] > 0 and 0 < layer["overlap"] <= 1 for layer in said.values())
    require_alike(ours(folder), theirs(folder))


@pytest.mark.parametrize(
    ("words", "groups"),
    slow_after(
        1,
        [
            ("", {"w_switch": 8, "w_down": 8}),
            ("format=packed", {"w_switch": 32, "w_down": 40}),
            ("group_size=16 format=packed", {"w_switch": 16, "w_down": 10}),
            ("group_size=0", {"w_switch": 32, "w_down": 40}),
        ],
    ),
)
def test_the_largest_group_that_divides_the_widths(words, groups, wide_made):
    folder = wide_made("mixtral", f"quantize method=rtn clip=max {words}")
    for part, group in groups.items():
        found = [module.group for name, module in packed_in(ours(folder)).items() if name.endswith(part)]
        assert found == [group] * tiny.LAYERS * tiny.EXPERTS
    require_alike(ours(folder), theirs(folder))


@pytest.fixture(scope="session")
def odd(wide_lab, tmp_path_factory) -> Options:
    """Options for a model whose down projections have 20 inputs, of which no group from 8 up to 16 is left."""
    return {**wide_lab("mixtral"), "model": str(wide("mixtral", tmp_path_factory.mktemp("odd") / "model", 20))}


@pytest.mark.parametrize("format", slow_after(1, ["packed", "dense", "auto"]))
def test_a_width_that_no_group_fits_is_left_as_it_is(format, odd, tmp_path):
    folder = moe_compress.compress(f"{FEW} format={format}", **{**odd, "out": str(tmp_path / "out")}).folder
    for layer, view in moe_views(ours(folder)).items():
        for e, old in enumerate(naive_pruning.matrices(stock(odd["model"]), "mixtral", layer)):
            assert torch.equal(old[2], view.stacks()["down"][e]) and not torch.equal(old[0], view.stacks()["gate"][e])
    said = report(folder)
    assert said["quantized"] == pytest.approx({"experts": 2 / 3})
    assert sorted(said["skipped"]) == [f"mlp.experts.down of layer {i}" for i in range(3)]
    assert len(packed_in(ours(folder))) == (0 if format == "dense" else 2 * tiny.LAYERS * tiny.EXPERTS)


def test_bits_are_shared_out_among_the_matrices_that_a_group_fits(odd, tmp_path):
    sentence = "quantize method=rtn clip=max group_size=8 bits=auto budget=3 format=packed"
    folder = moe_compress.compress(sentence, **{**odd, "out": str(tmp_path / "out")}).folder
    found = packed_in(ours(folder))
    assert len(found) == 2 * tiny.LAYERS * tiny.EXPERTS and not any(name.endswith("w_down") for name in found)
    assert report(folder)["bits"]["experts"] == pytest.approx(3.0, abs=0.05)


def test_one_group_for_all_is_asked_for_before_anything_is_read(odd, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    said = refused("quantize format=compressed-tensors", odd, tmp_path)
    assert "no group of 8 and more divides all widths" in said and not calls
