"""dtype=bfloat16: products in bf16, beside fp32 routers, norms and losses, and fp32 masters of what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_compress
from moe_compress.compression.recovery import stage as recovery_stage
from moe_compress.compression.recovery.arithmetic import load_dtype, training_dtype
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.models import hf
from moe_compress.models.component_map import NORMS, ROUTERS, component_of_modules
from moe_compress.models.moe import all_moe_views
from support import readers, tiny
from support.interrupted import Interrupted, counting, outcome
from support.pruned import refused as refused_in
from support.pruned import stored
from support.recovered import changed_tensors, gradients, reports, training, windows_of
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4"
BF16 = torch.bfloat16
HALF = "expert_drop score=weight_norm ratio=0.5"
RUN = f"{DROP} + distill steps=4 batch=4 keep=2 loss=logits,hidden,router,labels"
FAMILIES = slow_after(2, ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba", "llama4_text", "dbrx"])


def narrow(lab, place):
    return {**lab("mixtral"), "dtype": "bfloat16", "results": str(place), "out": str(place / "out")}


@pytest.mark.slow
def test_the_curve_is_that_of_single_precision(tmp_path):
    """Of a model that has learned something: random ones choose other experts for each rounding."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        options = {"model": "tiny-mixtral", "dtype": dtype, "eval": False, "samples": 16, "length": 128}
        given = {"results": str(tmp_path), "out": str(tmp_path / dtype)}
        folder = moe_compress.compress(f"{HALF} + distill steps=10 batch=4", **options, **given).folder
        curves[dtype] = reports(folder)[-1]["training"]["curve"]["logits"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.02) and curves["bfloat16"] != curves["float32"]
    assert curves["float32"][-1] < 0.7 * curves["float32"][0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_near_those_of_single_precision(family, recompute, lab, made):
    """As near as they can be where rounding sends a few of 30 tokens to other experts."""
    student, words = made(family, DROP), {"train": "experts,routers", "loss": "logits,hidden"}
    whole = training(student, lab(family), windows_of(), words)
    mixed = training(student, lab(family), windows_of(), words, BF16, recompute=recompute)
    (losses, wanted), (found, moved) = gradients(whole), gradients(mixed)
    assert found == pytest.approx(losses, rel=0.15) and found != losses and moved.keys() == wanted.keys()
    both = [torch.cat([each[name].flatten() for name in wanted]) for each in (moved, wanted)]
    assert float(torch.cosine_similarity(both[0], both[1], 0)) > 0.9
    assert all(each.dtype == torch.float32 for each in moved.values())


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "qwen3_next"]))
def test_what_is_held_and_run_in_which_numbers(family, lab, made):
    run = training(made(family, DROP), lab(family), windows_of(), {"train": "experts"}, BF16)
    model, seen = run.student.model, {}
    view = next(iter(all_moe_views(model).values()))
    norm = next(m for m in hf.decoder_layers(model)[0].modules() if type(m).__name__.endswith("Norm"))
    linear = next(m for m in hf.decoder_layers(model)[0].modules() if isinstance(m, nn.Linear) and m is not view.router)
    for name, module in {"router": view.router, "norm": norm, "linear": linear}.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out))
    hf.tap(view.block, view.experts, lambda rows: seen.__setitem__("experts", rows.output_RD))
    run.step(0)
    router = seen["router"] if isinstance(seen["router"], tuple) else (seen["router"],)
    assert all(each.dtype == torch.float32 for each in router if each.is_floating_point())
    assert (seen["norm"].dtype, seen["linear"].dtype, seen["experts"].dtype) == (torch.float32, BF16, BF16)
    run.optimiser.step(0)
    moments = [each for state in run.optimiser.adam.state.values() for each in state.values()]
    assert moments and {each.dtype for each in [*moments, *run.optimiser.parameters.values()]} == {torch.float32}
    places = component_of_modules(model)
    for name, parameter in model.named_parameters():
        exact = name in run.optimiser.parameters or parameter.dim() < 2
        exact = exact or places[name.rpartition(".")[0]] in (NORMS, ROUTERS)
        assert parameter.dtype == (torch.float32 if exact else BF16) or "conv" in name, name


@pytest.mark.parametrize("train", ["experts", "lora rank=2"])
def test_what_is_stored_in_single_precision_is_not_rounded(train, lab, made, tmp_path):
    first = made("mixtral", DROP)
    folder = moe_compress.compress(f"{DROP} + distill train={train} steps=2", **narrow(lab, tmp_path)).folder
    changed = changed_tensors(first, folder)
    before, after = stored(first), stored(folder)
    assert changed == {n for n in before if ".experts." in n or ("lora" in train and "self_attn." in n)}
    for name in changed if "lora" in train else ():
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert float(values[2]) <= 1e-5 * float(torch.linalg.svdvals(before[name].double())[0]), name


@pytest.mark.parametrize(
    "words",
    slow_after(
        1,
        [
            "quantize format=packed bits=2 method=rtn group_size=8 clip=max + qad learns=codes lr=0.001",
            "quantize format=packed bits=2 method=rtn group_size=8 clip=max + router_kd",
            "factorise rank=4 + distill train=new",
            f"{DROP} + distill train=all cache=topk top=8",
        ],
    ),
)
def test_stages_run_in_it(words, lab, made, tmp_path):
    words = f"{words} steps=3 batch=4"
    folder = moe_compress.compress(words, **narrow(lab, tmp_path)).folder
    found, expected = (reports(each)[-1]["training"]["curve"]["logits"] for each in (folder, made("mixtral", words)))
    assert found == pytest.approx(expected, rel=0.1) and found != expected


def test_a_stopped_run_goes_on(lab, monkeypatch, tmp_path):
    whole = moe_compress.compress(RUN, **narrow(lab, tmp_path / "whole")).folder
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=3)
        moe_compress.compress(RUN, **narrow(lab, tmp_path / "parts"))
    assert outcome(moe_compress.compress(RUN, **narrow(lab, tmp_path / "parts")).folder) == outcome(whole)


def test_it_takes_less_memory(lab, tmp_path, monkeypatch):
    """Of a model that is stored in single precision: its teacher's half, once both are loaded."""
    size = 4 * tiny.make("mixtral", vocab_size=readers.VOCAB).num_parameters()
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: 1.4 * size)
    words = f"{DROP} + distill train=routers steps=1"
    said = refused_in(words, {**lab("mixtral"), "dtype": "float32"}, tmp_path)
    assert "(the model in float32 " in said
    assert moe_compress.compress(words, **narrow(lab, tmp_path)).folder
    said = refused_in(words.replace("routers", "all"), {**lab("mixtral"), "dtype": "bfloat16"}, tmp_path / "more")
    assert "(the model in bfloat16 " in said


def test_which_numbers_a_run_trains_in():
    """Half precision has too few exponents for gradients; what is stored in more bits is loaded in these."""
    assert [training_dtype(each) for each in (BF16, torch.float16, torch.float32)] == [BF16, *2 * [torch.float32]]
    assert load_dtype(BF16, BF16) == BF16
    for stored_in, run in [(torch.float32, BF16), (torch.float16, BF16), (BF16, torch.float32), (BF16, torch.float16)]:
        assert load_dtype(stored_in, run) == torch.float32
