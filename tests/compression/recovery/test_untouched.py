"""Only what train= names changes: all else keeps its bytes, zeros stay, codes are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.load import load_model
from support import naive_pruning, readers, tiny
from support.pruned import stock, stored, stored_as
from support.quantized import form, ours
from support.recovered import changed_tensors, reports
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4"
ROUTERS = {
    "mixtral": "gate.weight",
    "deepseek_v3": "mlp.gate.weight",
    "gpt_oss": "mlp.router.",
    "jamba": "router.weight",
}
STAGES = ("router_kd steps=2", "router_kd solver=ridge", "layerwise train=routers steps=2")
STAGES = (*STAGES, "distill train=routers loss=hidden,router steps=2")
PACKED = (
    "quantize bits=4 method=rtn group_size=8 clip=max",
    "quantize format=packed bits=2 method=rtn group_size=8 clip=max",
)


def recovered(lab, family: str, first: Path, words: str, out: Path, **given: object) -> Path:
    """A checkpoint of ours that learns from the model it was made of."""
    options = {**lab(family), "model": str(first), "out": str(out), **given}
    return moe_compress.compress(f"{words} teacher={lab(family)['model']}", **options).folder


@pytest.mark.parametrize(
    ("family", "stage"),
    slow_after(
        5,
        [
            *(("mixtral", each) for each in STAGES),
            *((f, s) for f in list(ROUTERS)[1:] for s in STAGES[: 1 + (f != "jamba")]),
        ],
    ),
)
def test_a_stage_for_routers_changes_routers_alone(family, stage, lab, made, tmp_path):
    first = made(family, DROP)
    folder = recovered(lab, family, first, stage, tmp_path / "out")
    changed = changed_tensors(first, folder)
    assert changed and all(ROUTERS[family] in name for name in changed)
    assert {k: (t.dtype, t.shape) for k, t in stored(first).items()} == {
        k: (t.dtype, t.shape) for k, t in stored(folder).items()
    }
    assert json.loads((folder / "config.json").read_text()) == json.loads((first / "config.json").read_text())


@pytest.mark.parametrize(("engine", "part"), [("distill", "experts"), ("layerwise", "attention"), ("distill", "norms")])
def test_train_names_what_changes(engine, part, lab, made, tmp_path):
    first = made("mixtral", DROP)
    folder = recovered(lab, "mixtral", first, f"{engine} train={part} steps=2", tmp_path / "out")
    changed, meant = (
        changed_tensors(first, folder),
        {"experts": ".experts.", "attention": "self_attn.", "norms": "norm"},
    )
    assert changed and all(meant[part] in name for name in changed)


def test_all_is_all(lab, made, tmp_path):
    first = made("mixtral", DROP)
    changed = changed_tensors(first, recovered(lab, "mixtral", first, "distill train=all steps=2", tmp_path / "out"))
    assert changed == set(stored(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_weights_of_sixteen_bits_stay_so_and_what_is_not_trained_is_not_rounded(dtype, lab, tmp_path):
    """Training is in fp32; a tensor that is stored in fp32 among others stays in fp32."""
    model = stored_as("mixtral", tmp_path / "model", dtype, keep="gate.weight")
    options = {**lab("mixtral"), "model": str(model), "results": str(tmp_path / "results")}
    first = moe_compress.compress(DROP, **options, out=str(tmp_path / "first")).folder
    out = str(tmp_path / "out")
    folder = moe_compress.compress(
        f"distill train=experts,routers steps=2 teacher={model}", **{**options, "model": str(first), "out": out}
    ).folder
    changed = changed_tensors(first, folder)
    assert changed == {name for name in stored(first) if ".experts." in name or "gate.weight" in name}
    kinds = {name: tensor.dtype for name, tensor in stored(folder).items()}
    assert {kind for name, kind in kinds.items() if "gate.weight" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "gate.weight" not in name} == {dtype}


@pytest.mark.parametrize(
    ("words", "stage"),
    slow_after(
        3,
        [
            ("method=magnitude", "distill train=all steps=2 decay=0.1"),
            ("pattern=2:4 method=sparsegpt", "layerwise train=experts steps=2"),
            ("pattern=2:4 method=sparsegpt", "distill train=experts steps=2"),
            ("method=magnitude sparsity=0.002", "distill train=experts steps=2"),
            ("method=wanda where=experts,router", "router_kd steps=2"),
        ],
    ),
)
def test_what_was_pruned_stays_zero(words, stage, lab, made, tmp_path):
    """However few: of one expert's weights, too."""
    first = made("mixtral", f"prune {words}")
    folder = recovered(lab, "mixtral", first, stage, tmp_path / "out")
    old, new = stored(first), stored(folder)
    changed = changed_tensors(first, folder)
    assert changed and sum(int((each == 0).sum()) for each in old.values()) > 0
    for name, before in old.items():
        assert torch.equal(before == 0, new[name] == 0) or before.dim() == 1, name
    if "2:4" in words:
        for layer in range(tiny.LAYERS):
            for expert in naive_pruning.matrices(stock(folder), "mixtral", layer):
                assert all(int((each.unflatten(-1, (-1, 4)) == 0).sum(-1).min()) >= 2 for each in expert)


@pytest.mark.parametrize(
    ("family", "quantize", "stage"),
    slow_after(
        3,
        [
            ("mixtral", PACKED[0], "router_kd steps=2"),
            ("mixtral", PACKED[1], "router_kd solver=ridge"),
            ("gpt_oss", PACKED[1], "router_kd steps=2"),
            ("mixtral", PACKED[1], "router_kd steps=2"),
            ("mixtral", PACKED[0], "router_kd solver=ridge"),
            ("deepseek_v3", PACKED[0], "layerwise train=attention,routers steps=2 lr=1e-5"),
            ("deepseek_v3", PACKED[1], "distill train=attention,norms steps=2"),
        ],
    ),
)
def test_routers_learn_beside_experts_that_are_packed(family, quantize, stage, wide_lab, wide_made, tmp_path):
    """Codes and scales keep their bytes, and the layers' gradients come through them."""
    first = wide_made(family, quantize)
    folder = recovered(wide_lab, family, first, stage, tmp_path / "out")
    changed = changed_tensors(first, folder)
    assert changed and not any(".experts." in name for name in changed) and form(folder) == form(first)
    if stage == "router_kd steps=2":
        assert len({name.partition(".layers.")[2][0] for name in changed}) == tiny.LAYERS
    assert bool(ours(folder)(torch.tensor([[5, 6, 7]])).logits.isfinite().all())


@pytest.mark.parametrize("quantize", PACKED)
@pytest.mark.parametrize("words", ["distill train=experts", "layerwise", "distill train=all"])
def test_codes_are_not_trained(quantize, words, wide_lab, refused):
    said = refused(f"{quantize} + {words}", **{**wide_lab("mixtral"), "samples": 4})
    assert "experts are packed there, and codes cannot be trained" in said


@pytest.mark.slow
def test_routers_learn_beside_experts_in_fp8(lab, tmp_path):
    """Whose blocks are 128 inputs wide."""
    model = readers.save_model("mixtral", tmp_path / "model", hidden_size=128, intermediate_size=128, head_dim=32)
    options = {**lab("mixtral"), "model": str(model), "results": str(tmp_path / "results")}
    first = moe_compress.compress("quantize format=fp8 method=rtn", **options, out=str(tmp_path / "first")).folder
    given = {**options, "model": str(first), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"router_kd steps=2 teacher={model}", **given).folder
    assert {name.rsplit(".", 2)[-2] for name in changed_tensors(first, folder)} == {"gate"}
    assert "float8_e4m3fn" in str({tensor.dtype for tensor in stored(folder).values()})
    assert reports(folder)[-1]["training"]["trained"] == 3 * 8 * 128
    load_model(folder)
