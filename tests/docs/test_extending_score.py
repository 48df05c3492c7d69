"""docs/extending/score.md: its example is a score like any other, in the package and outside of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch

import moe_compress
from moe_compress.edits.plan_file import read_plan
from moe_compress.methods import registry, score_registry
from moe_compress.recipes.parser import parse
from support import naive, tiny
from support.expert_statistics import IDS, measured
from support.pages import DOCS, commands, require_command
from support.tiny import windows_of

TEXT = (DOCS / "extending" / "score.md").read_text(encoding="utf-8")


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    return in_package("score")


def test_it_is_known_before_it_is_imported(example):
    assert "mean_gate" in score_registry.NAMES.names()
    for words in commands(TEXT):
        require_command(words[2:])
    assert example not in sys.modules
    with pytest.raises(ValueError, match="did you mean 'mean_gate'"):
        parse("expert_drop score=mean_gates")


def test_it_is_the_mean_gate(example, family_checkpoint):
    expected = naive.reference(tiny.make("mixtral"), "mixtral", IDS)
    for index, sums in measured(family_checkpoint("mixtral"), windows_of(IDS)).items():
        known = expected[index].scores()
        mean_E = score_registry.scores()["mean_gate"].function(sums)
        torch.testing.assert_close(mean_E, known["gate_mass"] / known["frequency"], rtol=1e-5, atol=0, equal_nan=True)


def test_it_chooses_experts_end_to_end(example, lab):
    result = moe_compress.compress("expert_drop score=mean_gate keep=6", **lab("mixtral"))
    ((stage,), _) = read_plan(result.folder / "plan.json")
    for edit in stage.plan.edits:
        score_E = torch.tensor(stage.plan.scores[edit.layer])
        assert set(edit.experts) == set(score_E.topk(6).indices.tolist())
    assert moe_compress.load(str(result.folder)).config.num_local_experts == 6
    scores = score_registry.scores()["mean_gate"]
    assert (scores.needs, scores.paper, scores.summary) == ("text", "none: an example", "Mean of g_e over X_e.")


def test_a_module_of_ones_own_is_enough(elsewhere, lab):
    with pytest.raises(ValueError, match="score=mean_gate"):
        parse("expert_drop score=mean_gate")
    elsewhere("score", "my_scores")
    assert parse("expert_drop score=mean_gate").stages[0].parameters["score"] == "mean_gate"
    assert registry.find("expert_drop").needs(parse("expert_drop score=mean_gate").stages[0].parameters) == "text"
    result = moe_compress.compress("expert_drop score=mean_gate ratio=0.5 budget=global", **lab("deepseek_v3"))
    assert result.folder is not None
    with pytest.raises(ValueError, match="'mean_gate' is registered twice"):
        elsewhere("score", "my_scores_again")


def test_the_page_names_every_sum(family_checkpoint):
    (_, sums) = next(iter(measured(family_checkpoint("mixtral"), windows_of(IDS)).items()))
    rows = TEXT.partition("| sum | |")[2].partition("\n\n")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(sums)
    needs = TEXT.partition("| `needs` | the function")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", needs, re.MULTILINE) == list(get_args(score_registry.ScoreNeed))
