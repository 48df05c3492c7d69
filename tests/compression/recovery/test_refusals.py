"""Recoveries that cannot be are refused in a sentence, before a weight is read where that can be known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.compression.recovery import stage as recovery_stage
from moe_compress.compression.recovery import whole_model
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.trained_codes import TrainedMatrix, release
from support import readers, tiny
from support.pruned import refused as refused_in
from support.recovered import reports
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4 + "


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("distill steps=0", "distill.steps=0: a number above 0 is needed."),
        ("distill steps=-5", "distill.steps=-5: a number above 0 is needed."),
        ("layerwise batch=0", "layerwise.batch=0: a number above 0 is needed."),
        ("distill checkpoint_every=-1", "distill.checkpoint_every=-1: a number from 0 up is needed."),
        ("distill lr=1e39", "distill.lr=1e+39: a number up to 1e+30 is needed."),
        ("distill keep=0", "distill.keep=0: a number above 0 is needed."),
        ("router_kd lr=-1", "router_kd.lr=-1.0: a number above 0 is needed."),
        ("router_kd lr=0", "router_kd.lr=0.0: a number above 0 is needed."),
        ("layerwise lr=nan", "layerwise.lr=nan: a number above 0 is needed."),
        ("distill lr=inf", "distill.lr=inf: a number above 0 is needed."),
        ("distill warmup=1.5", "distill.warmup=1.5: a share from 0 to 1 is needed."),
        ("distill decay=-1", "distill.decay=-1.0: a number from 0 up is needed."),
        ("layerwise clip=-1", "layerwise.clip=-1.0: a number from 0 up is needed."),
        ("distill train=foo", "train=foo: a comma-separated list of all, routers, experts"),
        ("layerwise train=", "train=: a comma-separated list of all, routers, experts"),
        ("distill train=new", "train=new: mixtral as it is here has none of these."),
        ("layerwise train=shared", "train=shared: mixtral as it is here has none of these."),
        ("distill loss=foo", "loss=foo: each of logits, hidden, router, experts, labels once, with its weight"),
        ("distill loss=logits,logits", "loss=logits,logits: each of logits, hidden, router, experts, labels once"),
        ("distill loss=logits:0", "loss=logits:0: the weight of logits is a number above 0."),
        ("distill loss=logits:-1", "loss=logits:-1: the weight of logits is a number above 0."),
        ("distill loss=logits:a", "loss=logits:a: the weight of logits is a number above 0."),
        ("distill loss=hidden:inf", "loss=hidden:inf: the weight of hidden is a number above 0."),
        ("distill loss=", "loss=: each of logits, hidden, router, experts, labels once"),
        ("distill temperature=0", "temperature=0: a number above 0 is needed."),
        ("router_kd temperature=-2", "temperature=-2: a number above 0 is needed."),
        ("distill divergence=jsd beta=1", "beta=1: a number between 0 and 1 is needed."),
        ("distill divergence=sideways", "distill.divergence=sideways: allowed: forward, reverse, jsd."),
        ("distill divergence=forward beta=0.3", "distill.beta=0.3 would do nothing: it goes with divergence=jsd."),
        ("distill loss=labels temperature=2", "temperature=2 would do nothing: loss=labels has no logits."),
        ("distill loss=hidden divergence=reverse", "divergence=reverse temperature=1 would do nothing"),
        ("router_kd solver=ridge steps=5", "router_kd.steps=5 would do nothing: it goes with solver=adam."),
        ("router_kd solver=ridge lr=0.1", "router_kd.lr=0.1 would do nothing: it goes with solver=adam."),
        ("router_kd ridge=0.1", "router_kd.ridge=0.1 would do nothing: it goes with solver=ridge."),
        ("router_kd solver=ridge ridge=0", "ridge=0: a number above 0 is needed."),
        ("layerwise recompute=true", "unknown key 'recompute': known: "),
        ("layerwise keep=5", "unknown key 'keep': known: "),
        ("layerwise inputs=both", "layerwise.inputs=both: allowed: student, teacher."),
        ("rebalance", "mixtral as it is here has no selection bias to be moved (layers [0, 1, 2]): rebalance is for"),
        ("rebalance rounds=0", "rounds=0 rate=0.02 tolerance=0.05: all above 0 are needed."),
        ("rebalance steps=5", "unknown key 'steps': known: "),
    ],
)  # fmt: skip
def test_words_of_which_nothing_comes(sentence, said, lab, refused):
    assert said in refused(DROP + sentence, **lab("mixtral"))


@pytest.mark.parametrize("name", ["router_kd", "distill", "layerwise", "rebalance", "router_kd solver=ridge"])
def test_the_first_stage_has_nothing_to_recover_without_a_teacher(name, lab, refused):
    assert "has nothing to recover: put it behind a stage that compresses, or name" in refused(name, **lab("mixtral"))


@pytest.mark.parametrize("name", ["router_kd", "layerwise"])
def test_a_model_does_not_learn_from_itself(name, lab, refused):
    said = refused(f"{name} teacher={lab('mixtral')['model']}", **lab("mixtral"))
    assert "would learn from itself" in said


@pytest.fixture(scope="module")
def strangers(tmp_path_factory, reader_folder) -> dict[str, Path]:
    """Teachers that a tiny Mixtral cannot learn from."""
    place = tmp_path_factory.mktemp("strangers")
    other = readers.save_model("mixtral", place / "renamed")
    readers.tokenizer([line[::-1] for line in readers.LINES]).save_pretrained(other)
    wide = tiny.save(tiny.make("mixtral"), place / "vocabulary")
    return {
        "renamed": other,
        "vocabulary": wide,
        "narrow": readers.save_model("mixtral", place / "narrow", hidden_size=16),
        "deep": readers.save_model("mixtral", place / "deep", num_hidden_layers=4),
        "few": readers.save_model("mixtral", place / "few", num_local_experts=4),
        "other": readers.save_model("qwen3_moe", place / "other"),
        "young": _of_another_seed(place / "young"),
    }


def _of_another_seed(folder: Path) -> Path:
    tiny.save(tiny.make("mixtral", seed=5, vocab_size=readers.VOCAB), folder)
    readers.tokenizer().save_pretrained(folder)
    return folder


COMPARES = ("router_kd solver=ridge", "layerwise", "distill loss=hidden", "distill loss=logits,router")


@pytest.mark.parametrize(
    ("which", "words", "said"),
    slow_after(
        8,
        [
            ("vocabulary", "router_kd", f"has a vocabulary of {tiny.VOCAB}, the model one of {readers.VOCAB}."),
            ("renamed", "distill", "has other tokens than the model: "),
            ("narrow", COMPARES[0], "the teacher's hidden states have 16 numbers, the model's 32"),
            ("deep", COMPARES[1], "the teacher has 4 layers, of which 4 would be left, but the model has 3"),
            ("few", COMPARES[2], "the router of layer 0 does not descend from the teacher's"),
            *(("few", words, "the router of layer 0 does not descend from the teacher's") for words in COMPARES[3:]),
            *(("deep", words, "it was not made of this teacher") for words in COMPARES),
        ],
    ),
)
def test_a_teacher_that_cannot_be_one(which, words, said, strangers, lab, refused):
    """Known from configs and tokenizers; the stages before it have not run."""
    assert said in refused(f"{DROP}{words} teacher={strangers[which]}", **lab("mixtral"))


@pytest.mark.parametrize("words", slow_after(2, COMPARES))
def test_a_checkpoint_of_ours_knows_what_it_was_made_of(words, strangers, lab, made, refused):
    """A teacher of the same shapes is another model all the same; next tokens can be learned from it."""
    options = {**lab("mixtral"), "model": str(made("mixtral", "expert_drop score=weight_norm keep=4"))}
    said = refused(f"{words} teacher={strangers['young']}", **options)
    assert "was not made of teacher=" in said and f"name {lab('mixtral')['model']}" in said


@pytest.mark.slow
def test_next_tokens_are_learned_from_any_model_of_the_same_tokens(strangers, made, lab, tmp_path):
    options = {**lab("mixtral"), "model": str(made("mixtral", "expert_drop score=weight_norm keep=4"))}
    words = f"distill train=all steps=30 lr=0.01 teacher={strangers['other']}"
    folder = moe_compress.compress(words, **options, out=str(tmp_path / "out")).folder
    curve = reports(folder)[-1]["training"]["curve"]["logits"]
    assert curve[-1] < 0.5 * curve[0]


def test_a_loss_that_is_no_number_ends_the_run(lab, tmp_path):
    said = refused_in(f"{DROP}distill lr=1e30 warmup=0 steps=8 clip=0 train=all", lab("mixtral"), tmp_path)
    assert "is no number: a lower lr= helps, or a longer warmup=. Nothing is written." in said
    assert "the loss (logits) of step " in said and not list(tmp_path.rglob("*.partial"))


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(lab, tmp_path, monkeypatch):
    real = DistillationRun.step
    monkeypatch.setattr(DistillationRun, "step", lambda run, n: real(run, n) if n < 2 else ({"logits": math.nan}, 1))
    with pytest.raises(ValueError, match="of step 3 is no number") as caught:
        moe_compress.compress(f"{DROP}distill steps=4 checkpoint_every=1", **lab("mixtral"), out=str(tmp_path / "out"))
    assert str(caught.value).endswith(f"The last checkpoint is {tmp_path / 'out.steps' / 'step-00002'}.")


def test_too_little_text_for_a_window(lab, tmp_path, refused):
    (tmp_path / "few.txt").write_text("one two three")
    said = refused(f"{DROP}router_kd", **{**lab("mixtral"), "data": str(tmp_path / "few.txt")})
    assert "holds fewer tokens than one window of 16" in said


def test_two_models_and_what_training_remembers_have_to_fit(lab, tmp_path, monkeypatch):
    """Say what would; nothing is loaded before."""
    model = 4 * tiny.make("mixtral", vocab_size=readers.VOCAB).num_parameters()
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: 3 * model)
    monkeypatch.setattr(whole_model, "load_as_run", None)
    said = refused_in(f"{DROP}distill train=all", lab("mixtral"), tmp_path)
    assert "gradients and moments of what is trained" in said and "train less (router_kd, train=lora)" in said
    assert "one layer at a time (layerwise, router_kd solver=ridge)" in said
    monkeypatch.undo()
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: 3 * model)
    for n, words in enumerate(("router_kd steps=1", "layerwise steps=1")):
        assert moe_compress.compress(DROP + words, **lab("mixtral"), out=str(tmp_path / str(n))).folder


def test_the_held_out_text_is_not_trained_on(lab, texts, tmp_path, refused):
    """Windows are those of data=; documents that both texts hold are refused unless that is asked for."""
    shutil.copy(texts / "calibration.txt", tmp_path / "same.txt")
    options = {**lab("mixtral"), "eval": True}
    said = refused(f"{DROP}distill steps=1", **{**options, "eval_data": str(tmp_path / "same.txt")})
    assert "allow_overlap" in said
    given = {**options, "out": str(tmp_path / "out"), "results": str(tmp_path / "results")}
    folder = moe_compress.compress(f"{DROP}distill steps=1", **given).folder
    assert reports(folder)[-1]["calibration"]["use"] == "calibration"
    assert reports(folder)[-1]["calibration"]["source"] == "calibration.txt"


def test_a_plan_does_not_hold_what_was_learned(lab, made, tmp_path):
    folder = made("mixtral", f"{DROP}router_kd solver=ridge")
    with pytest.raises(ValueError, match=r"its stage router_kd changes weights, which no plan holds"):
        moe_compress.apply(folder / "plan.json", **{"out": str(tmp_path / "out"), "results": str(tmp_path)})
    assert json.loads((folder / "plan.json").read_text())["stages"][-1]["edits"] == []


def test_a_step_larger_than_the_text_is_named(lab, tmp_path, caplog):
    told = {**lab("mixtral"), "out": str(tmp_path / "out"), "samples": 3}
    moe_compress.compress(DROP + "distill steps=1 batch=4", **told)
    assert "batch=4: the text has 3 windows, so that a step sees some of them again." in caplog.messages


def test_scales_that_are_no_numbers_are_not_written(made):
    model = moe_compress.load(made("mixtral", "quantize bits=4 group_size=16"))
    release(model, frozenset({"scales"}))
    matrix = next(each for each in model.modules() if isinstance(each, TrainedMatrix))
    matrix.scales.data[0, 0] = 1e30
    assert matrix.coded(torch.bfloat16).scale_OG.isfinite().all()
    with pytest.raises(ValueError, match="trained scales would hold NaN or infinity: nothing is written"):
        matrix.coded(torch.float16)
