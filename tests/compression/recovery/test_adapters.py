"""train=lora: adapters learn, for every way to hold experts, and leave ordinary weights."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.steps import finished_steps
from moe_compress.compression.recovery import stage as recovery_stage
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.recipes.parser import parse
from support import readers, tiny
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.pruned import refused as refused_in
from support.pruned import stored, windows
from support.recovered import changed_tensors, gradients, layer_notes, reports, require_alike, training, windows_of
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4"
LORA = f"{DROP} + distill train=lora rank=2 steps=4 keep=1 batch=4"
STUDENTS = [
    ("mixtral", DROP),
    ("gpt_oss", DROP),
    ("mixtral", "channels ratio=0.5 within=layer"),
    ("mixtral", "factorise rank=4"),
    ("deepseek_v3", DROP),
    ("qwen3_next", DROP),
    ("llama4_text", DROP),
    ("dbrx", DROP),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "before"), slow_after(3, STUDENTS))
def test_gradients_are_those_of_the_matrices_by_the_chain_rule(family, before, recompute, lab, made):
    """Of W + s B A: s G A' at B, and s B' G at A."""
    student = made(family, before)
    whole = training(student, lab(family), windows_of(), {"train": "experts,attention"})
    run = training(student, lab(family), windows_of(), {"train": "lora", "rank": 2, "alpha": 3.0}, recompute=recompute)
    (losses, dense), (found, moved) = gradients(whole), gradients(run)
    assert found == pytest.approx(losses, rel=1e-6)
    names = [name.removesuffix(".lora_A") for name in moved if name.endswith(".lora_A")]
    a = {name: run.optimiser.parameters[f"{name}.lora_A"].detach() for name in names}
    require_alike(
        {name: moved[f"{name}.lora_B"] for name in names},
        {name: 1.5 * dense[name] @ a[name].transpose(-1, -2) for name in names},
    )
    assert all(not bool(moved[f"{name}.lora_A"].any()) for name in names)  # B is zero
    left = {name for name in dense if name not in names and "bias" not in name}
    assert not any(".experts." in name and dense[name].dim() > 1 for name in left)
    assert any(".experts." in name for name in names) and any("attn" in name for name in names)


def test_the_other_factor_is_felt_once_the_first_is_there(lab, made):
    run = training(made("mixtral", DROP), lab("mixtral"), windows_of(), {"train": "lora", "rank": 2})
    run.step(0)
    run.optimiser.step(0)
    _, moved = gradients(run)
    assert all(bool(each.any()) for name, each in moved.items() if name.endswith("lora_A") and "experts" in name)


def test_what_is_left_are_ordinary_weights_moved_by_few_directions(lab, made):
    first, left = made("mixtral", DROP), made("mixtral", LORA)
    assert changed_tensors(first, left) == {n for n in stored(first) if ".experts." in n or "self_attn." in n}
    before, after = stored(first), stored(left)
    for name in changed_tensors(first, left):
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        size = float(torch.linalg.svdvals(before[name].double())[0])
        assert float(values[2]) <= 1e-5 * size < float(values[0]), name


def test_what_is_written_is_what_was_trained(lab, made, tmp_path):
    """The loss on windows held aside, as it was measured with adapters, is that of the checkpoint without them."""
    left = made("mixtral", f"{LORA} holdout=0.25")
    said = reports(left)[-1]["training"]["holdout"]
    assert said["kept_step"] > 0
    again = training(left, lab("mixtral"), windows(lab("mixtral")), {"train": "routers"}, holdout=0.25, steps=1)
    found = again.run(tmp_path / "state")["holdout"]["losses"][0]
    assert found == pytest.approx(min(said["losses"]), rel=1e-5) and found < said["losses"][0]


def test_the_report_counts_adapters_alone(lab, made):
    found = reports(made("mixtral", LORA))[-1]["training"]
    before = stored(made("mixtral", DROP))
    shapes = [each.shape for name, each in before.items() if "self_attn." in name]
    experts = [each.shape for name, each in before.items() if ".experts." in name]
    one = len([each for each in experts if each == experts[0]])
    assert one and found["trained"] == sum(2 * sum(shape) for shape in shapes) + tiny.LAYERS * 4 * 2 * (
        (2 * tiny.INNER + tiny.HIDDEN) + (tiny.HIDDEN + tiny.INNER)
    )
    assert found["optimiser_bytes"] == 8 * found["trained"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [("lora,routers", (".experts.", "self_attn.", "gate.weight")), ("lora,attention", ("self_attn.",))],
)
def test_words_beside_it(words, meant, lab, made):
    """Parts with matrices say which are adapted; others are trained whole."""
    first = made("mixtral", DROP)
    left = made("mixtral", LORA.replace("train=lora", f"train={words}"))
    assert changed_tensors(first, left) == {name for name in stored(first) if any(each in name for each in meant)}


def test_pruned_weights_stay_pruned(lab, made):
    first = made("mixtral", "prune pattern=2:4 method=magnitude")
    left = made("mixtral", f"prune pattern=2:4 method=magnitude + {LORA.partition(' + ')[2]} lr=0.01")
    before, after = stored(first), stored(left)
    experts = [name for name in changed_tensors(first, left) if ".experts." in name]
    assert experts and all(torch.equal(before[name] == 0, after[name] == 0) for name in experts)
    assert all(float((after[name] == 0).double().mean()) == 0.5 for name in experts)


@pytest.mark.parametrize("engine", slow_after(1, ["distill", "layerwise"]))
def test_a_stopped_run_goes_on(engine, lab, made, monkeypatch, tmp_path):
    words = LORA if engine == "distill" else f"{DROP} + layerwise train=lora,routers rank=2 steps=3 batch=4"
    given = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=3)
        moe_compress.compress(words, **given)
    with monkeypatch.context() as patch:
        steps = counting(patch, Optimiser, "step")
        moe_compress.compress(words, **given)
    assert len(steps) == (1 if engine == "distill" else 6) and leftovers(tmp_path) == []
    assert outcome(tmp_path / "out") == outcome(made("mixtral", words))


def test_checkpoints_on_the_way_are_ordinary_ones(lab, made, tmp_path):
    """With what has been added to their matrices by then."""
    given = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{LORA} checkpoint_every=2", **given).folder
    first, (step,) = made("mixtral", DROP), [each for each in finished_steps(folder) if each.step == 2]
    assert changed_tensors(first, step.folder) == changed_tensors(step.folder, folder) == changed_tensors(first, folder)
    assert outcome(folder) == outcome(made("mixtral", LORA))


def test_layers_learn_one_by_one(lab, made):
    first = made("mixtral", DROP)
    left = made("mixtral", f"{DROP} + layerwise train=lora rank=2 steps=8 lr=0.01 batch=4")
    assert changed_tensors(first, left) == {n for n in stored(first) if ".experts." in n or "self_attn." in n}
    assert all(after < before for before, after in layer_notes(left, "error"))


def test_they_take_less_memory(lab, tmp_path, monkeypatch):
    """Where gradients and moments of whole experts would not fit, those of adapters do."""
    size = 4 * tiny.make("mixtral", vocab_size=readers.VOCAB).num_parameters()
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: 2.6 * size)
    said = refused_in(f"{DROP} + distill train=experts,attention steps=1", lab("mixtral"), tmp_path)
    assert "gradients and moments of what is trained" in said
    words = f"{DROP} + distill train=lora rank=1 steps=1"
    assert moe_compress.compress(words, **lab("mixtral"), out=str(tmp_path / "out")).folder


def test_recipes_without_them_are_what_they_were():
    plain, adapted = (parse(f"distill teacher=a{more}").stages[0] for more in ("", " train=lora rank=4"))
    assert not {"rank", "alpha"} & plain.lasting_parameters.keys()
    assert adapted.lasting_parameters["rank"] == 4 and "alpha" not in adapted.lasting_parameters


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distill rank=4", "rank=4 alpha=16 would do nothing: adapters are asked for by train=lora."),
        ("layerwise alpha=4", "rank=8 alpha=4 would do nothing: adapters are asked for by train=lora."),
        ("distill train=lora rank=0", "rank=0 alpha=16: numbers above 0 are needed."),
        ("distill train=lora alpha=-1", "rank=8 alpha=-1: numbers above 0 are needed."),
        ("distill train=lora,all", "train=lora,all: all beside lora means nothing: it goes with experts, attention,"),
        ("distill train=lora,scales", "train=lora,scales: scales beside lora means nothing: it goes with experts,"),
        ("distill train=lora,shared", "train=shared: mixtral as it is here has none of these."),
        ("distill train=lora rank=64", "use a lower rank=, or train these whole (train=attention,experts)."),
    ],
)
def test_words_of_which_nothing_comes(words, said, lab, refused):
    assert said in refused(f"{DROP} + {words}", **lab("mixtral"))


def test_codes_have_no_adapters(lab, refused):
    said = refused(
        "quantize format=packed bits=4 method=rtn group_size=8 clip=max + distill train=lora", **lab("mixtral")
    )
    assert (
        "train=lora: experts are packed there, and what adapters add would make them dense: train scales (qad)" in said
    )
    assert "routers (train=routers), or put this stage before the one that quantizes." in said
