"""What a step's losses and gradients do not depend on: padding, how many tokens run together, chunks, recomputing."""

from __future__ import annotations

import pytest
import torch

from moe_compress.compression.recovery import distillation
from moe_compress.compression.recovery.distillation import rows_of_step
from moe_compress.models.hf import layer_calls
from support import naive_recovery as slow
from support import readers
from support.recovered import WORDS, gradients, require_alike, said_by, training, windows_of
from support.slow import slow_after

DROPPED = "expert_drop score=weight_norm keep=4"
EVERYTHING = {"train": "all", "loss": "logits,labels:0.5,hidden:0.3,router:0.2"}
FAMILIES = slow_after(2, ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba"])


def require_same_step(one, other):
    """Two runs' losses and gradients, to 1e-5 of the largest."""
    (losses, moved), (expected, wanted) = gradients(one), gradients(other)
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-7)
    require_alike(moved, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, lab, made):
    padded, mask = torch.zeros(len(WORDS), 16, dtype=torch.long), torch.zeros(len(WORDS), 16, dtype=torch.bool)
    padded[:, :10], mask[:, :10] = WORDS, True
    student = made(family, DROPPED)
    of = [training(student, lab(family), each, EVERYTHING) for each in (windows_of(padded, mask), windows_of())]
    require_same_step(*of)


@pytest.mark.parametrize("tokens", [1, 20])
def test_how_many_tokens_run_together_changes_nothing(tokens, lab, made, monkeypatch):
    """Windows of which some tokens do not count weigh what theirs that count weigh."""
    said = torch.ones_like(WORDS, dtype=torch.bool)
    said[0, 2:], said[1] = False, False
    student = made("mixtral", DROPPED)
    whole = training(student, lab("mixtral"), windows_of(said=said), EVERYTHING)
    parts = training(student, lab("mixtral"), windows_of(said=said), EVERYTHING)
    expected = gradients(whole)
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", tokens)
    found = gradients(parts)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    require_alike(found[1], expected[1])


@pytest.mark.parametrize("rows", [1, 7])
def test_how_many_logits_are_made_at_a_time_changes_nothing(rows, lab, made, monkeypatch):
    student = made("mixtral", DROPPED)
    whole, parts = (training(student, lab("mixtral"), windows_of(), EVERYTHING) for _ in range(2))
    expected = gradients(whole)
    monkeypatch.setattr(layer_calls, "LOGITS_PER_CHUNK", rows * readers.VOCAB)
    found = gradients(parts)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    require_alike(found[1], expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_nothing(family, lab, made):
    student = made(family, DROPPED)
    of = [training(student, lab(family), windows_of(), EVERYTHING, recompute=again) for again in (True, False)]
    require_same_step(*of)


def test_only_tokens_that_count_are_predicted(lab, made):
    """As where only what the assistant says counts: the token before such a one predicts it, whoever said that."""
    said = torch.zeros_like(WORDS, dtype=torch.bool)
    said[0, 4:7], said[2, 0] = True, True
    student, model = made("mixtral", DROPPED), lab("mixtral")["model"]
    (ours, left), (theirs, wanted) = (said_by(f, "mixtral", WORDS)[0] for f in (student, model))
    words = {"loss": "logits,labels,hidden"}
    found, _ = gradients(training(student, lab("mixtral"), windows_of(said=said), words))
    predicting = [(0, 3), (0, 4), (0, 5)]  # nothing predicts the first token of a window
    kl = [slow.divergence("forward", ours[at], theirs[at]) for at in predicting]
    labels = [-float(ours[b, s].log_softmax(-1)[WORDS[b, s + 1]]) for b, s in predicting]
    counted = [(0, 4), (0, 5), (0, 6), (2, 0)]
    errors = [slow.hidden_error(a[at], t[at]) for a, t in zip(left, wanted, strict=True) for at in counted]
    assert found["logits"] == pytest.approx(sum(kl) / 3, rel=1e-4)
    assert found["labels"] == pytest.approx(sum(labels) / 3, rel=1e-4)
    assert found["hidden"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_step_on_windows_in_which_nothing_counts_moves_nothing(lab, made):
    nothing = torch.zeros_like(WORDS, dtype=torch.bool)
    run = training(made("mixtral", DROPPED), lab("mixtral"), windows_of(said=nothing), EVERYTHING)
    losses, moved = gradients(run)
    assert set(losses.values()) == {0.0} and not any(bool(each.any()) for each in moved.values())


def test_every_window_is_seen_once_before_any_is_seen_again():
    seen = torch.cat([rows_of_step(step, 3, 7, seed=5) for step in range(7)]).view(3, 7)
    assert torch.equal(seen.sort(1).values, torch.arange(7).expand(3, 7)) and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], torch.cat([rows_of_step(step, 1, 7, seed=5) for step in range(7)]))
    assert not torch.equal(seen[0], torch.cat([rows_of_step(step, 1, 7, seed=6) for step in range(7)]))
