"""docs/extending/model_method.md: its example is a method like any other, in the package and outside of it."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch

import moe_compress
from moe_compress.cli.catalogue import method_markdown
from moe_compress.edits import edits
from moe_compress.edits.plan_file import read_plan
from moe_compress.methods import registry
from moe_compress.methods.registry import Method
from moe_compress.recipes.parser import parse
from moe_compress.utils.declarations import declarations
from support.pages import DOCS, commands, require_command, table_words

TEXT = (DOCS / "extending" / "model_method.md").read_text(encoding="utf-8")
NAME = "busiest_experts"


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    """The page's file in the package, and the table of methods read anew, as it is at import."""
    name = in_package("model_method")
    registry.METHODS.update({d.name: registry._method(d) for d in declarations(registry.PACKAGE, "method")})
    return name


def test_it_is_known_before_it_is_imported(example):
    for words in commands(TEXT):
        require_command(words[2:])
    shown = method_markdown(NAME)
    assert "Keep the experts of every layer that most tokens use. Paper: none: an example." in shown
    assert "- `keep=6`: whole number" in shown and "- `preset=few`: keep=4" in shown and "keep: experts left" in shown
    with pytest.raises(ValueError, match="did you mean 'keep'"):
        parse(f"{NAME} kep=6")
    assert example not in sys.modules


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_it_keeps_the_busiest(family, example, lab):
    result = moe_compress.compress(f"{NAME} preset=few", **lab(family))
    ((stage,), _) = read_plan(result.folder / "plan.json")
    for edit in stage.plan.edits:
        count_GN = torch.tensor(stage.plan.scores[edit.layer]).view(1 if family == "mixtral" else 2, -1)
        cut_G = count_GN.sort(descending=True).values[:, 4 // len(count_GN) - 1]
        kept = {(e // count_GN.shape[1], e % count_GN.shape[1]) for e in edit.experts}
        assert len(edit.experts) == 4 and all(count_GN[place] >= cut_G[place[0]] for place in kept)
        assert 0 < stage.plan.report["share_of_choices_left"][str(edit.layer)] < 1
    assert moe_compress.load(str(result.folder))(torch.arange(8)[None]).logits.isfinite().all()


def test_counts_that_cannot_be_are_refused_before_anything_runs(example, lab, forwards):
    with pytest.raises(ValueError, match="keep=1 is fewer than the 2 experts each token uses"):
        moe_compress.compress(f"{NAME} keep=1", **lab("mixtral"))
    with pytest.raises(ValueError, match="keep=5 is not possible"):
        moe_compress.compress(f"{NAME} keep=5", **lab("deepseek_v3"))
    assert not forwards


def test_a_module_of_ones_own_is_enough(elsewhere, lab):
    with pytest.raises(ValueError, match=f"unknown method '{NAME}'"):
        parse(NAME)
    elsewhere("model_method", "my_methods")
    result = moe_compress.compress(f"expert_drop keep=7 + {NAME} keep=6", **lab("mixtral"))
    assert moe_compress.load(str(result.folder)).config.num_local_experts == 6
    with pytest.raises(ValueError, match=f"'{NAME}' is registered twice"):
        elsewhere("model_method", "my_methods_again")


def test_what_the_source_says_is_what_the_module_says(example):
    declared = registry.METHODS[NAME]
    declared.implementation  # noqa: B018 - imports the module
    run = registry.IMPLEMENTATIONS[NAME].run
    given = {key: getattr(declared, key) for key in ("group", "paper", "presets", "shown_in_names")}
    defined = registry._method(registry.of_function(run, "method", "model", **given))
    assert dataclasses.replace(defined, declaration=declared.declaration) == declared


def test_the_tables_name_every_argument_need_and_edit():
    own = {field.name for field in dataclasses.fields(Method)} - {"name", "scope", "declaration", "parameters"}
    assert set(table_words(TEXT, "argument")) >= {*own - {"quantizes", "leaves_pattern", "allocates"}, "needs", "check"}
    needs = {*table_words(TEXT, "`needs` | the method is given")}
    assert needs == set(get_args(registry.Need)) - {"input_squares", "input_grams"}
    kinds = [each.__name__ for each in get_args(edits.Edit)]
    said = TEXT.partition("one of the eleven kinds")[2].partition("Edits are carried")[0]
    assert re.findall(r"`(\w+)`", said) == kinds and len(kinds) == 11
