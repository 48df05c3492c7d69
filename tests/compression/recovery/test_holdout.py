"""Windows that a training does not see say which of its states is left."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from moe_compress.compression.recovery.holdout import Holdout
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.recipes.parser import parse
from support import naive_recovery as slow
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.pruned import refused as refused_in
from support.recovered import WORDS, changed_tensors, reports, said_by, training, windows_of

DROP = "expert_drop score=weight_norm keep=4"
RUINED = f"{DROP} + distill steps=6 keep=2 batch=3 lr=3 warmup=0 clip=0 holdout=0.25"


def values(run):
    return {name: each.detach().clone() for name, each in run.optimiser.parameters.items()}


def trained(run, tmp_path):
    """Its report, and by steps taken what its parameters were then."""
    states = {}
    report = run.run(tmp_path / "training.safetensors", lambda curve: states.__setitem__(curve.steps, values(run)))
    return report, states


def require_same_values(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()


def test_what_is_measured_is_the_loss_on_the_last_windows(lab, made, tmp_path):
    student = made("mixtral", DROP)
    (ours, _), (theirs, _) = (said_by(folder, "mixtral", WORDS)[0] for folder in (student, lab("mixtral")["model"]))
    at = [(2, s) for s in range(WORDS.shape[1] - 1)]
    kl = sum(slow.divergence("forward", ours[place], theirs[place]) for place in at) / len(at)
    run = training(student, lab("mixtral"), windows_of(), {"loss": "logits:2"}, holdout=0.34, steps=1)
    assert run.run(tmp_path / "s")["holdout"]["losses"][0] == pytest.approx(2 * kl, rel=1e-4)


def test_windows_that_are_held_aside_are_not_trained_on(lab, made, tmp_path):
    student, some = made("mixtral", DROP), {"steps": 3, "lr": 1e-3, "batch": 2}
    run = training(student, lab("mixtral"), windows_of(), holdout=0.34, **some)
    fewer = training(student, lab("mixtral"), windows_of(WORDS[:2]), **some)
    _, states = trained(run, tmp_path / "one")
    _, expected = trained(fewer, tmp_path / "other")
    require_same_values(states[3], expected[3])


@pytest.mark.parametrize("rate", [3.0, 0.3, 1e-3])
def test_the_best_state_that_was_measured_is_left(rate, lab, made, tmp_path, caplog):
    """Of a rate far too high, the one before training; whatever it is, what the report says it is."""
    run = training(
        made("mixtral", DROP), lab("mixtral"), windows_of(), {"train": "all"},
        holdout=0.34, steps=8, keep=2, lr=rate, warmup=0.0, clip=0.0,
    )  # fmt: skip
    report, states = trained(run, tmp_path)
    said = report["holdout"]
    losses = dict(zip(said["steps"], said["losses"], strict=True))
    assert said["steps"] == [0, 2, 4, 6, 8] and said["windows"] == 1
    assert said["kept_step"] == min(losses, key=lambda step: losses[step])
    require_same_values(values(run), states[said["kept_step"]])
    assert said["worse_at_the_end"] == (losses[8] > losses[0]) == ("what is left is the state behind" in caplog.text)
    if rate == 3.0:
        assert said["kept_step"] == 0 and said["worse_at_the_end"]
    if rate == 1e-3:
        assert said["kept_step"] > 0 and not said["worse_at_the_end"]


def test_a_ruined_training_leaves_the_model_that_it_was_given(lab, made):
    """Byte by byte; without a holdout it is written as it ended."""
    left = made("mixtral", RUINED)
    assert reports(left)[-1]["training"]["holdout"]["kept_step"] == 0
    assert not changed_tensors(made("mixtral", DROP), left)
    assert changed_tensors(made("mixtral", DROP), made("mixtral", RUINED.replace(" holdout=0.25", "")))


def test_a_stopped_run_knows_the_best_state(lab, made, monkeypatch, tmp_path):
    given = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, Optimiser, "step", stop_at=5)
        moe_compress.compress(RUINED, **given)
    with monkeypatch.context() as patch:
        steps = counting(patch, Optimiser, "step")
        moe_compress.compress(RUINED, **given)
    assert len(steps) == 2 and leftovers(tmp_path) == []
    assert outcome(tmp_path / "out") == outcome(made("mixtral", RUINED))
    found, expected = (reports(each)[-1]["training"]["holdout"] for each in (tmp_path / "out", made("mixtral", RUINED)))
    assert found == expected


def test_a_recipe_without_it_is_what_it_was():
    plain, held = (parse(f"distill teacher=a{more}").stages[0] for more in ("", " holdout=0.1"))
    assert "holdout" not in plain.lasting_parameters and held.lasting_parameters["holdout"] == 0.1
    assert held.explicit_parameters["holdout"] == 0.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distill holdout=1", "distill.holdout=1.0: a share from 0 to less than 1 is needed."),
        ("router_kd holdout=-0.1", "router_kd.holdout=-0.1: a share from 0 to less than 1 is needed."),
        ("router_kd holdout=0.1 solver=ridge", "router_kd.holdout=0.1 would do nothing: it goes with solver=adam."),
        ("layerwise holdout=0.1", "unknown key 'holdout': did you mean"),
        ("distill holdout=0.99", "windows leaves none to train on: a smaller share, or more text (samples=)"),
    ],
)
def test_shares_of_which_nothing_comes(words, said, lab, tmp_path):
    assert said in refused_in(f"{DROP} + {words}", lab("mixtral"), tmp_path)


def test_held_windows_of_which_nothing_counts_are_refused():
    said = torch.ones_like(WORDS, dtype=torch.bool)
    said[2] = False
    with pytest.raises(ValueError, match=r"no token of the last 1 windows counts: use a larger share"):
        Holdout.of(0.34, windows_of(said=said))
