"""Layerwise training, routers fitted in closed form, and selection biases, one layer at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.compression import pipeline
from moe_compress.compression.recovery.layer_training import variation
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.run.progress import Bar
from support import tiny
from support.pruned import moe_layers, reference, windows
from support.recovered import changed_tensors, layer_notes, reports, said_by
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4"


def altered(folder: Path, place: Path, word: str, noise: float) -> Path:
    """A copy, to the tensors of whose names `word` is part noise is added."""
    shutil.copytree(folder, place)
    (file,) = place.glob("model*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if word in name:
            tensor += noise * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return place


def learned(lab, family: str, student: Path, words: str, place: Path, **given: object) -> Path:
    """What a model that was changed by hand learns from the one it was made of."""
    options = {**lab(family), "model": str(student), "out": str(place), **given}
    return moe_compress.compress(f"{words} teacher={lab(family)['model']}", **options).folder


# --- what is told meanwhile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "family", "name"),
    [
        (f"{DROP} + layerwise steps=3", "mixtral", "error"),
        (f"{DROP} + router_kd solver=ridge", "mixtral", "kl"),
        ("expert_drop score=weight_norm keep=4 + rebalance rounds=2", "deepseek_v3", "variation"),
    ],
)
def test_every_layer_is_a_line_of_the_log(words, family, name, lab, tmp_path, caplog):
    told = {**lab(family), "out": str(tmp_path / "out"), "results": str(tmp_path / "runs")}
    with caplog.at_level("INFO", "moe_compress"):
        folder = moe_compress.compress(words, **told).folder
    (log,) = (tmp_path / "runs" / "logs").glob("*.jsonl")
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "layer"]
    reported = reports(folder)[-1]["layers"]
    assert {str(line["layer"]): line[name] for line in lines} == {n: note[name] for n, note in reported.items()}
    assert lines and all(line["tokens_per_second"] > 0 for line in lines)
    assert any(f": {name} " in said and " -> " in said for said in caplog.messages)


class Shown(Bar):
    """A bar that remembers what it shows."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.said: list[str] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def say(self, what: str, said: str) -> None:
        self.said.append(f"{what}: {said}")


@pytest.mark.parametrize(
    ("words", "steps", "term"), [("layerwise steps=2", 2, "error"), ("router_kd solver=ridge", 1, "kl")]
)
def test_the_bar_goes_on_with_every_step_of_every_layer(words, steps, term, lab, tmp_path, monkeypatch):
    bar = Shown()
    monkeypatch.setattr(pipeline, "progress_bar", lambda _: contextlib.nullcontext(bar))
    moe_compress.compress(f"{DROP} + {words}", **{**lab("mixtral"), "out": str(tmp_path / "out")})
    total = tiny.LAYERS * steps
    shown = [done for done, of in bar.seen[-len(bar.said) :] if of == total]
    assert shown == sorted(shown) and {*shown} >= {*range(1, total + 1)}
    assert len(shown) == len(bar.said) and all(f": {term} " in said and " tokens/s" in said for said in bar.said)
    assert bar.said[-1].startswith(f"layer {tiny.LAYERS} of {tiny.LAYERS}: ")


# --- layerwise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "better"),
    slow_after(
        3, [("", True), ("inputs=teacher", True), ("train=all", True), ("lr=1e6", False), ("train=norms", True)]
    ),
)
def test_a_layers_error_never_rises(words, better, made):
    notes = layer_notes(made("mixtral", f"{DROP} + layerwise steps=4 {words}"), "error")
    assert len(notes) == tiny.LAYERS
    assert all(after < before if better else after == before for before, after in notes)


def test_a_layer_that_gained_nothing_keeps_its_bytes(made, lab, tmp_path):
    first = made("mixtral", DROP)
    assert changed_tensors(first, learned(lab, "mixtral", first, "layerwise steps=4 lr=1e6", tmp_path / "out")) == set()


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_error_reported_is_what_a_stock_model_makes_of_the_text(train, lab, made):
    """inputs=student: the last layer's error after it has learned is the whole model's at that place."""
    folder = made("mixtral", f"{DROP} + layerwise steps=4 train={train}")
    ids = windows(lab("mixtral")).ids_NS
    (_, ours), (_, theirs) = (said_by(f, "mixtral", ids)[0] for f in (folder, lab("mixtral")["model"]))
    expected = [
        float(((a - b).square().sum(-1) / b.square().sum(-1)).mean()) for a, b in zip(ours, theirs, strict=True)
    ]
    assert [after for _, after in layer_notes(folder, "error")] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", slow_after(1, ["phimoe", "dbrx", "qwen3_next"]))
def test_a_teacher_in_bf16_teaches_layers_in_fp32(family, lab, tmp_path):
    words = {**lab(family), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{DROP} + layerwise steps=2 inputs=teacher", **words).folder
    assert all(after <= before for before, after in layer_notes(folder, "error"))


@pytest.mark.slow
def test_layers_that_learn_on_what_the_student_has_end_nearer_than_those_on_what_the_teacher_has(lab, made):
    """They make up for earlier errors."""
    ids, last = windows(lab("mixtral")).ids_NS, {}
    (_, theirs), _, _ = said_by(lab("mixtral")["model"], "mixtral", ids)
    for inputs in ("student", "teacher"):
        (_, ours), _, _ = said_by(made("mixtral", f"{DROP} + layerwise steps=20 inputs={inputs}"), "mixtral", ids)
        last[inputs] = float(((ours[-1] - theirs[-1]).square().sum(-1) / theirs[-1].square().sum(-1)).mean())
    assert last["student"] < last["teacher"]


@pytest.mark.parametrize(("batch", "windows"), slow_after(1, [(2, {8}), (3, {10, 11}), (8, {32})]))
def test_a_step_sees_as_many_windows_as_batch_says(batch, windows, lab, made, tmp_path):
    """Four steps on eight windows of 16 tokens, all of which would fit into one of the engine's batches."""
    folder = learned(lab, "mixtral", made("mixtral", DROP), f"layerwise steps=4 batch={batch}", tmp_path / "out")
    notes = reports(folder)[-1]["layers"].values()
    assert {note["tokens"] for note in notes} <= {16 * each for each in windows}


# --- routers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_after(2, ["gpt_oss", "deepseek_v3", "mixtral", "hunyuan_v1_moe", "qwen3_next"]))
def test_a_router_that_was_spoilt_is_put_back_on_the_same_stream(family, lab, tmp_path):
    """Of the first layer with experts, into which nothing differs yet; a bias is found again, too."""
    model = Path(str(lab(family)["model"]))
    first = moe_layers(model, family)[0]
    spoilt = altered(model, tmp_path / "spoilt", "router" if family == "gpt_oss" else ".gate.w", 0.3)
    folder = learned(lab, family, spoilt, "router_kd solver=ridge ridge=1e-6", tmp_path / "out", samples=32)
    before, after = reports(folder)[-1]["layers"][str(first)]["kl"]
    assert before > 1e-3 and after < 1e-6 * before
    ids = windows(lab(family)).ids_NS
    ours, theirs = (said_by(f, family, ids)[1][first] for f in (folder, model))
    if family not in ("deepseek_v3",):  # a softmax does not see what all logits have in common
        ours, theirs = (each - each.mean(-1, keepdim=True) for each in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", slow_after(1, ["deepseek_v3", "gpt_oss", "mixtral"]))
def test_a_fitted_router_is_the_least_squares_of_what_is_left(family, lab, made, tmp_path):
    """From what stock models in float64 see of the last layer: W + argmin |X d - (Z_teacher - X W)|^2 + r m |d|^2."""
    first = made(family, DROP)
    folder = learned(lab, family, first, "router_kd solver=ridge ridge=0.1", tmp_path / "out")
    ids, layer = windows(lab(family)).ids_NS, moe_layers(first, family)[-1]
    router = f"model.layers.{layer}.mlp.{'router' if family == 'gpt_oss' else 'gate'}"
    inputs = _router_inputs(folder, router, ids)
    edits = [edit for stage in read_plan(first / PLAN)[0] for edit in stage.plan.edits]
    (kept,) = [list(edit.experts) for edit in edits if edit.layer == layer]
    wanted = said_by(lab(family)["model"], family, ids)[1][layer].flatten(0, 1)[:, kept]
    state = {n: p.detach() for n, p in reference(first).get_submodule(router).named_parameters()}
    weight, bias = state["weight"], state.get("bias")
    residual = wanted - inputs @ weight.T - (0 if bias is None else bias)
    assert float(residual.norm()) > 0.01 * float(wanted.norm())
    residual = residual if family == "deepseek_v3" else residual - residual.mean(1, keepdim=True)
    scale = (0.1 * float(inputs.square().sum(0).mean())) ** 0.5
    ones, none = (
        [torch.full((n, 1), v).double()] * (bias is not None) for n, v in ((len(inputs), 1.0), (tiny.HIDDEN, 0.0))
    )
    rows = torch.cat([torch.cat([inputs, *ones], 1), torch.cat([scale * torch.eye(tiny.HIDDEN).double(), *none], 1)])
    answers = torch.cat([residual, residual.new_zeros(tiny.HIDDEN, residual.shape[1])])
    added = torch.linalg.lstsq(rows, answers).solution
    after = {n: p.detach() for n, p in reference(folder).get_submodule(router).named_parameters()}
    torch.testing.assert_close(after["weight"], weight + added[: tiny.HIDDEN].T, rtol=1e-4, atol=1e-5)
    if bias is not None:
        torch.testing.assert_close(after["bias"], bias + added[tiny.HIDDEN], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _router_inputs(folder: Path, router: str, ids: torch.Tensor) -> torch.Tensor:
    """What a stock model gives a router, in float64; the layer's own router has no part in it."""
    model, given = reference(folder), []
    model.get_submodule(router).register_forward_hook(lambda _m, args, _o: given.append(args[0].flatten(0, -2)))
    model.set_experts_implementation("eager")
    model(ids, use_cache=False)
    return given[0]


@pytest.mark.parametrize(
    "before", slow_after(1, [DROP, "expert_merge keep=4", "channels ratio=0.5", "block_drop layers=1"])
)
def test_a_routers_kl_never_rises(before, made):
    notes = layer_notes(made("mixtral", f"{before} + router_kd solver=ridge"), "kl")
    assert all(after <= first for first, after in notes) and any(after < first for first, after in notes)


# --- balance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", slow_after(1, [0.2, 0.05]))
def test_experts_are_used_as_evenly_as_before_again(noise, lab, tmp_path):
    """Whose selection biases were spoilt by hand: only these change."""

    model = Path(str(lab("deepseek_v3")["model"]))
    spoilt = altered(model, tmp_path / "spoilt", "e_score_correction_bias", noise)
    folder = learned(lab, "deepseek_v3", spoilt, "rebalance tolerance=0.1", tmp_path / "out", samples=32)
    assert {name.rpartition(".")[2] for name in changed_tensors(spoilt, folder)} == {"e_score_correction_bias"}
    for note in reports(folder)[-1]["layers"].values():
        before, after = note["variation"]
        assert after <= 1.1 * note["teacher"] and after <= before


@pytest.mark.slow
def test_experts_that_are_left_are_used_as_evenly_as_all_were(made):
    notes = reports(made("deepseek_v3", f"{DROP} + rebalance"))[-1]["layers"]
    assert len(notes) == tiny.LAYERS - 1
    for note in notes.values():
        before, after = note["variation"]
        assert after <= 1.05 * note["teacher"] and after <= before


def test_an_even_load_varies_by_nothing_and_one_expert_alone_by_the_root_of_the_others():
    assert variation(torch.tensor([5, 5, 5, 5])) == 0.0
    assert variation(torch.tensor([8, 0, 0, 0])) == pytest.approx(3**0.5)
    assert variation(torch.tensor([0, 0])) == 0.0
