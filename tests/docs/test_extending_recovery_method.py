"""docs/extending/recovery_method.md: its example is a method like any other, in the package and outside of it."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.steps import finished_steps
from moe_compress.cli.catalogue import method_markdown
from moe_compress.methods import recovery_method, registry
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.recipes.parser import parse
from moe_compress.utils.declarations import declarations
from support.pages import DOCS, commands, require_command, table_words
from support.recovered import changed_tensors

TEXT = (DOCS / "extending" / "recovery_method.md").read_text(encoding="utf-8")
DROP = "expert_drop keep=4"


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    """The page's file in the package, and the table of methods read anew, as it is at import."""
    name = in_package("recovery_method")
    registry.METHODS.update({d.name: registry._method(d) for d in declarations(registry.PACKAGE, "recovery_method")})
    return name


def test_it_is_known_before_it_is_imported(example):
    for words in commands(TEXT):
        require_command(words[2:])
    shown = method_markdown("skew_kd")
    assert "- `skew=0.1`: number" in shown and "- `lr=0.003`: number" in shown and "skew: the original's share" in shown
    assert parse(f"{DROP} + skew_kd").stages[1].parameters["checkpoint_every"] == 0
    assert example not in sys.modules


def test_its_loss_is_the_formula(example):
    student_PV, teacher_PV = torch.randn(5, 9), torch.randn(5, 9)
    task = registry.find("skew_kd").run(skew=0.3)
    found_P = task.divergence(student_PV, teacher_PV)
    for student_V, teacher_V, found in zip(student_PV.double(), teacher_PV.double(), found_P, strict=True):
        q_V, p_V = ((each.exp() / each.exp().sum()).tolist() for each in (student_V, teacher_V))
        expected = sum(p * math.log(p / (0.3 * p + 0.7 * q)) for p, q in zip(p_V, q_V, strict=True))
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_it_trains_a_checkpoint_end_to_end(example, lab, tmp_path):
    told = {**lab("mixtral"), "results": str(tmp_path / "runs")}
    before = moe_compress.compress(DROP, **{**told, "out": str(tmp_path / "before")}).folder
    words = f"{DROP} + skew_kd steps=3 batch=2 checkpoint_every=2"
    after = moe_compress.compress(words, **{**told, "out": str(tmp_path / "after")}).folder
    assert before is not None and after is not None
    changed = changed_tensors(before, after)
    assert changed and all("gate.weight" in name or "norm" in name for name in changed)
    assert [each.step for each in finished_steps(after)] == [0, 2]


def test_words_that_mean_nothing_are_refused_before_anything_runs(example, lab, forwards):
    for words, said in (("skew=1", "skew=1: a number between 0 and 1"), ("train=router", "train=router: a comma")):
        with pytest.raises(ValueError, match=said):
            moe_compress.compress(f"{DROP} + skew_kd {words}", **lab("mixtral"))
    assert not forwards


def test_a_module_of_ones_own_is_enough(elsewhere, lab):
    with pytest.raises(ValueError, match="unknown method 'skew_kd'"):
        parse("skew_kd")
    elsewhere("recovery_method", "my_methods")
    result = moe_compress.compress(f"{DROP} + skew_kd steps=1 batch=1", **lab("mixtral"))
    assert moe_compress.load(str(result.folder)).config.num_local_experts == 4
    with pytest.raises(ValueError, match="'skew_kd' is registered twice"):
        elsewhere("recovery_method", "my_methods_again")


def test_the_tables_name_every_argument_parameter_and_kind():
    arguments = registry.NEEDED["recovery_method"] | registry.ALLOWED["recovery_method"]
    assert set(table_words(TEXT, "argument of `@recovery_method`")) == arguments
    assert set(table_words(TEXT, "parameter")) == {field.name for field in dataclasses.fields(TrainingOptions)}
    rows = TEXT.partition("\n| kind | fields |")[2].partition("\n\n")[0]
    said = {row.split("`")[1]: re.findall(r"`(\w+)`", row.split("|")[2]) for row in re.findall(r"^\| `.*$", rows, re.M)}
    kinds = get_args(recovery_method.Recovery)
    assert said == {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in kinds}
    assert table_words(TEXT, "field") == [field.name for field in dataclasses.fields(recovery_method.Distillation)]
