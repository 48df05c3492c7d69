"""loss=experts beside stock models in float64, one token and one expert at a time."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from moe_compress.compression.recovery import distillation
from moe_compress.compression.recovery.lineage import members_after
from moe_compress.edits.edits import DropLayer, KeepExperts, MergeExperts
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.models.moe import all_moe_views
from support import naive, tiny
from support import naive_pruning as slow
from support import naive_recovery as losses
from support.pruned import reference
from support.recovered import WORDS, gradients, reports, require_alike, training, windows_of
from support.slow import slow_after

ALONE = {"train": "all", "loss": "experts"}
CASES = [
    ("mixtral", "channels ratio=0.5"),
    ("mixtral", "expert_merge keep=5"),
    ("gpt_oss", "expert_merge keep=5"),
    ("deepseek_v3", "expert_merge keep=4"),
    ("mixtral", "expert_drop score=weight_norm keep=4 + prune sparsity=0.5 method=magnitude"),
    ("mixtral", "layer_drop layers=1 + channels ratio=0.5"),
]


def edits_of(student):
    return [edit for stage in read_plan(student / PLAN)[0] for edit in stage.plan.edits]


def teachers_layer(edits, layer):
    """Which layer of the teacher it was: of three, of which perhaps one was dropped."""
    gone = [edit.layer for edit in edits if isinstance(edit, DropLayer)]
    return [each for each in range(tiny.LAYERS) if each not in gone][layer]


def made_of(edits, layer, experts):
    """Of each expert in a layer, its members and their weights: of one cut and then one merge at most."""
    found = [[(expert, 1.0)] for expert in range(experts)]
    for edit in edits:
        if isinstance(edit, KeepExperts) and edit.layer == layer:
            found = [found[expert] for expert in edit.experts]
        if isinstance(edit, MergeExperts) and edit.layer == layer:
            groups = zip(edit.groups, edit.weights, strict=True)
            found = [[(e, w / sum(weights)) for e, w in zip(group, weights, strict=True)] for group, weights in groups]
    return found


def expected_loss(student, teacher, family, edits, mask=None):
    """Of stock models: the mean of all pairs' errors in each layer, the mean of layers."""
    by_layer = []
    for layer, experts in slow.rows(student, family, WORDS, mask).items():
        ours, theirs = (
            [naive.expert(family, model.config, block.experts, e).run for e in range(len(block.experts.down_proj))]
            for model, block in (
                (student, slow.block_of(student, family, layer)),
                (teacher, slow.block_of(teacher, family, teachers_layer(edits, layer))),
            )
        )
        members, errors = made_of(edits, layer, len(theirs)), []
        for e, seen in enumerate(experts):
            for x in seen.inputs:
                wanted = sum(w * theirs[m](x) for m, w in members[e]).detach()
                errors.append((ours[e](x) - wanted).square().sum() / wanted.square().sum())
        by_layer.append(sum(errors) / len(errors))
    return sum(by_layer) / len(by_layer)


@pytest.mark.parametrize(("family", "before"), slow_after(3, CASES))
def test_loss_and_gradients_are_those_of_stock_models(family, before, lab, made):
    """Nothing but experts is moved by it, whatever train= names."""
    student = made(family, before)
    found, moved = gradients(training(student, lab(family), windows_of(), ALONE))
    ours, theirs = reference(student).requires_grad_(), reference(lab(family)["model"])
    with torch.enable_grad():
        loss = expected_loss(ours, theirs, family, edits_of(student))
        loss.backward()
    assert found["experts"] == pytest.approx(loss.item(), rel=1e-4) and found["experts"] > 1e-4
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    alive = {name: each * (ours.get_parameter(name) != 0) for name, each in expected.items()}
    require_alike({n: moved[n] * (ours.get_parameter(n) != 0) for n in moved}, {n: alive[n] for n in moved}, 1e-4)
    assert all(".experts." in name for name, each in moved.items() if bool(each.any()))


@pytest.mark.parametrize("what", ["mask", "said"])
def test_only_tokens_that_count_do(what, lab, made):
    """The first few of every window: what is behind them is padding, or said by somebody else."""
    student, first = made(*CASES[0]), torch.arange(WORDS.shape[1]) < torch.tensor([[5], [2], [9]])
    found, _ = gradients(training(student, lab("mixtral"), windows_of(**{what: first}), ALONE))
    ours, theirs = reference(student), reference(lab("mixtral")["model"])
    expected = expected_loss(ours, theirs, "mixtral", edits_of(student), first)
    assert found["experts"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("before", slow_after(1, ["factorise rank=4", "factorise structure=shared_basis rank=4"]))
def test_experts_in_factors_are_held_beside_whole_ones(before, lab, made):
    student = made("mixtral", before)
    run = training(student, lab("mixtral"), windows_of(), {"train": "experts", "loss": "experts"})
    assert run.experts is not None
    sent = {}
    with torch.no_grad():
        run.student.states(distillation.text_batch(run.windows, torch.arange(3), run.student.device))
    for layer, each in run.experts.sent.items():
        sent[layer] = list(zip(each.expert_R.tolist(), each.input_RD.double(), strict=True))
    by_layer = []
    views, others = (all_moe_views(whole.model) for whole in (run.student, run.teacher))
    for layer, pairs in sent.items():
        errors = []
        for e, x in pairs:
            ours, theirs = (
                one.down.double() @ (naive._silu(one.gate.double() @ x) * (one.up.double() @ x))
                for one in (views[layer].expert(e), others[layer].expert(e))
            )
            errors.append(losses.hidden_error(ours, theirs))
        by_layer.append(sum(errors) / len(errors))
    found, moved = gradients(run)
    assert found["experts"] == pytest.approx(sum(by_layer) / len(by_layer), rel=1e-4) and found["experts"] > 1e-3
    assert any(bool(each.any()) for each in moved.values())


@pytest.mark.parametrize("before", slow_after(1, [CASES[0][1], "factorise structure=shared_basis rank=4"]))
@pytest.mark.parametrize("words", [ALONE, {"train": "all", "loss": "logits,experts:0.1"}])
def test_recomputing_and_parts_change_nothing(words, before, lab, made, monkeypatch):
    student = made("mixtral", before)
    expected = gradients(training(student, lab("mixtral"), windows_of(), words))
    again = training(student, lab("mixtral"), windows_of(), words, recompute=True)
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", 20)
    found = gradients(again)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    require_alike(found[1], expected[1])


def test_losses_add_up_by_their_weights(lab, made):
    student, of = made(*CASES[0]), {}
    for loss in ("logits", "experts", "logits,experts:0.1"):
        of[loss] = gradients(training(student, lab("mixtral"), windows_of(), {"loss": loss}))
    found = of["logits,experts:0.1"]
    assert found[0] == pytest.approx({**of["logits"][0], **of["experts"][0]}, rel=1e-6)
    both = {name: of["logits"][1][name] + 0.1 * of["experts"][1][name] for name in found[1]}
    require_alike(found[1], both)


@pytest.mark.parametrize(
    "words", ["train=experts lr=0.01", "train=lora,experts rank=2 lr=0.01", "train=experts lr=0.01 holdout=0.25 keep=4"]
)
def test_experts_come_nearer(words, lab, made):
    folder = made("mixtral", f"expert_merge keep=5 + distill loss=experts steps=8 batch=8 {words}")
    curve = reports(folder)[-1]["training"]["curve"]["experts"]
    assert curve[-1] < 0.9 * curve[0]


def test_experts_that_were_kept_give_what_they_gave(lab, made):
    student = made("mixtral", "expert_drop score=weight_norm keep=4")
    found, _ = gradients(training(student, lab("mixtral"), windows_of(), ALONE))
    assert found["experts"] == pytest.approx(0.0, abs=1e-9)


def test_it_runs_in_bf16_beside_a_teacher_in_few_bits(lab, tmp_path):
    words = "expert_merge keep=5 + distill loss=experts,logits teacher_bits=8 steps=6 batch=8 lr=0.01 train=experts"
    options = {**lab("mixtral"), "dtype": "bfloat16", "results": str(tmp_path), "out": str(tmp_path / "out")}
    curve = reports(moe_compress.compress(words, **options).folder)[-1]["training"]["curve"]["experts"]
    assert curve[-1] < curve[0]


def test_shares_of_what_was_merged_twice_and_cut():
    edits = [
        MergeExperts(0, ((0, 3), (1,), (2,)), ((3.0, 1.0), (1.0,), (2.0,)), "centroid"),
        KeepExperts(0, (2, 0)),
        MergeExperts(0, ((1, 0),), ((1.0, 4.0),), "sum"),
    ]
    (found,) = members_after(edits, 4)
    assert found == pytest.approx({0: 0.15, 3: 0.05, 2: 0.8})
    assert members_after([MergeExperts(0, ((0, 1),), ((0.0, 2.0),), "sum")], 2) == [{1: 1.0}]


@pytest.mark.parametrize(
    ("before", "words", "said"),
    [
        ("expert_drop keep=4", "loss=experts train=routers", "loss=experts would do nothing to train=routers: name"),
        ("expert_drop keep=4", "loss=experts train=lora,attention", "would do nothing to train=lora,attention: name"),
        ("expert_drop keep=4", "loss=logits,experts cache=topk top=4", "no hidden states, routing or experts"),
        ("skip share=0.2", "loss=experts", "loss=experts: tokens skip experts by their gates (layers [0, 1, 2])"),
        ("densify", "loss=experts train=all", "loss=experts: no layer that is left has experts: use loss=hidden."),
    ],
)
def test_experts_that_cannot_be_compared(before, words, said, lab, refused):
    assert said in refused(f"{before} + distill {words}", **lab("mixtral"))
