"""The losses of a step and their gradients, beside stock models in float64 and the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_compress.edits.ancestry import Ancestry
from moe_compress.edits.plan_file import PLAN, read_plan
from support import naive_recovery as slow
from support import tiny
from support.recovered import WORDS, gradients, require_alike, said_by, training, windows_of
from support.slow import slow_after

CASES = [
    ("mixtral", "expert_drop score=weight_norm keep=4"),
    ("deepseek_v3", "expert_drop score=weight_norm keep=4"),
    ("mixtral", "expert_merge keep=5"),
    ("gpt_oss", "expert_drop score=weight_norm keep=6"),
    ("deepseek_v3", "expert_merge keep=4"),
    ("qwen3_next", "expert_drop score=weight_norm keep=4"),
]
EVERYWHERE = [(b, s) for b in range(WORDS.shape[0]) for s in range(WORDS.shape[1])]
BEFORE_OTHERS = [(b, s) for b, s in EVERYWHERE if s + 1 < WORDS.shape[1]]


@pytest.mark.parametrize(
    ("words", "kind", "temperature"),
    [
        ({}, "forward", 1.0),
        ({"divergence": "reverse", "temperature": 2.0}, "reverse", 2.0),
        ({"divergence": "jsd", "beta": 0.3}, "jsd", 1.0),
    ],
)
def test_logits_are_the_mean_divergence_of_all_predicting_tokens(words, kind, temperature, lab, made):
    student = made(*CASES[0])
    (ours, _), (theirs, _) = (said_by(f, "mixtral", WORDS)[0] for f in (student, lab("mixtral")["model"]))
    each = [slow.divergence(kind, ours[b, s], theirs[b, s], temperature, 0.3) for b, s in BEFORE_OTHERS]
    found, _ = gradients(training(student, lab("mixtral"), windows_of(), words))
    assert found["logits"] == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_labels_are_what_follows_and_not_what_is_there(lab, made):
    student = made(*CASES[0])
    (ours, _), _, _ = said_by(student, "mixtral", WORDS)
    each = [-float(ours[b, s].log_softmax(-1)[WORDS[b, s + 1]]) for b, s in BEFORE_OTHERS]
    found, _ = gradients(training(student, lab("mixtral"), windows_of(), {"loss": "labels"}))
    assert found["labels"] == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize(("family", "before"), slow_after(2, [*CASES[:2], ("mixtral", "layer_drop layers=1")]))
def test_hidden_is_each_layers_error_over_what_it_should_give(family, before, lab, made):
    student = made(family, before)
    (_, ours), (_, theirs) = (said_by(f, family, WORDS)[0] for f in (student, lab(family)["model"]))
    layers = [
        sum(slow.hidden_error(a[b, s], t[b, s]) for b, s in EVERYWHERE) for a, t in zip(ours, theirs, strict=True)
    ]
    found, _ = gradients(training(student, lab(family), windows_of(), {"loss": "hidden"}))
    assert found["hidden"] == pytest.approx(sum(layers) / len(layers) / len(EVERYWHERE), rel=1e-4)


@pytest.mark.parametrize(("family", "before"), slow_after(3, CASES))
def test_router_is_the_kl_of_each_routers_choice(family, before, lab, made):
    student, model = made(family, before), lab(family)["model"]
    (_, ours, _), (_, theirs, _) = (said_by(f, family, WORDS) for f in (student, model))
    edits = [edit for stage in read_plan(student / PLAN)[0] for edit in stage.plan.edits]
    place = Ancestry.of(edits, tiny.LAYERS, dict.fromkeys(theirs, tiny.EXPERTS)).place
    scores = "sigmoid" if family == "deepseek_v3" else "softmax"
    each = []
    for layer, given in ours.items():
        wanted = [slow.routing(theirs[layer][b, s], place[layer], given.shape[-1], scores) for b, s in EVERYWHERE]
        each.append(sum(slow.router_kl(given[at], w, scores) for at, w in zip(EVERYWHERE, wanted, strict=True)))
    found, _ = gradients(training(student, lab(family), windows_of(), {"loss": "router"}))
    assert found["router"] == pytest.approx(sum(each) / len(each) / len(EVERYWHERE), rel=2e-4, abs=1e-9)


@pytest.mark.parametrize(("family", "before"), slow_after(2, CASES))
def test_gradients_of_all_losses_at_once_are_those_of_the_stock_model(family, before, lab, made):
    """All of the model, embeddings, head and routers too, each loss with a weight of its own."""
    student = made(family, before)
    words = {"train": "all", "loss": "logits:0.5,labels:2,hidden:0.3"}
    run = training(student, lab(family), windows_of(), words)
    found, moved = gradients(run)
    with torch.no_grad():
        (said, left), _, _ = said_by(lab(family)["model"], family, WORDS)
    with torch.enable_grad():
        (logits, states), _, model = said_by(student, family, WORDS, trains=True)
        before_PV, wanted_PV = logits[:, :-1].flatten(0, 1), said[:, :-1].flatten(0, 1)
        wanted_PV = wanted_PV.log_softmax(-1)
        kl = (wanted_PV.exp() * (wanted_PV - before_PV.log_softmax(-1))).sum(-1).mean()
        labels = cross_entropy(before_PV, WORDS[:, 1:].flatten())
        errors = [(a - b).square().sum(-1) / b.square().sum(-1) for a, b in zip(states, left, strict=True)]
        hidden = torch.stack(errors).mean()
        (0.5 * kl + 2 * labels + 0.3 * hidden).backward()
    expected = {"logits": kl.item(), "labels": labels.item(), "hidden": hidden.item()}
    assert found == pytest.approx(expected, rel=1e-4)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    require_alike(moved, {name: grads[name] for name in moved}, 1e-4)
    assert moved.keys() == {name for name, parameter in run.student.model.named_parameters()}
