"""docs/extending/stage_preset.md: its example is a word like any other, in the package and outside of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

import moe_compress
from moe_compress.cli.catalogue import method_markdown
from moe_compress.methods import registry
from moe_compress.recipes.parser import parse
from moe_compress.recipes.recipe import build
from moe_compress.utils.declarations import declarations
from support.pages import DOCS, commands, require_command

TEXT = (DOCS / "extending" / "stage_preset.md").read_text(encoding="utf-8")
ROUND = "prune sparsity={} + distill train=experts steps=5"


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    """The page's file in the package, and the table of methods read anew, as it is at import."""
    name = in_package("stage_preset")
    registry.METHODS.update({d.name: registry._method(d) for d in declarations(registry.PACKAGE, "stage_preset")})
    return name


def test_it_is_known_before_it_is_imported(example):
    shown = method_markdown("gradual_prune")
    assert "- `rounds=3`: whole number from 1" in shown and "steps: of every distill" in shown
    assert example not in sys.modules
    for words in commands(TEXT):
        require_command(words[2:])


def test_it_is_the_recipe_of_its_stages(example):
    found = parse("gradual_prune sparsity=0.8 rounds=2 steps=5")
    assert found == parse(f"{ROUND.format(0.7)} + {ROUND.format(0.8)}")
    again = parse("gradual_prune rounds=1 + top_k k=1", ["1.steps=5", "2.k=2"])
    assert again == parse(f"{ROUND.format(0.5)} + top_k k=2")


@pytest.mark.parametrize("words", ["sparsity=1", "rounds=0", "steps=none"])
def test_words_that_mean_nothing_are_refused(example, words):
    with pytest.raises(ValueError, match=rf"gradual_prune\.{words}: .* needed"):
        parse(f"gradual_prune {words}")


def test_its_share_is_zero_in_the_end(example, lab):
    result = moe_compress.compress("gradual_prune sparsity=0.5 rounds=2 steps=1", **lab("mixtral"))
    experts = {n: p for n, p in moe_compress.load(str(result.folder)).named_parameters() if ".experts." in n}
    assert experts
    for name, weight in experts.items():
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01), name


def test_a_module_of_ones_own_is_enough(elsewhere):
    with pytest.raises(ValueError, match="unknown method 'gradual_prune'"):
        parse("gradual_prune")
    elsewhere("stage_preset", "my_presets")
    assert len(parse("gradual_prune").stages) == 6
    with pytest.raises(ValueError, match="'gradual_prune' is registered twice"):
        elsewhere("stage_preset", "my_presets_again")


def test_a_stage_may_be_a_preset_itself(example):
    @registry.stage_preset(group="presets of stages", paper="none: a test")
    def two_cuts() -> list[tuple[str, dict[str, object]]]:
        return [("gradual_prune", {"sparsity": 0.8, "rounds": 2, "steps": 5}), ("top_k", {"k": 1})]

    try:
        assert (
            build([("two_cuts", {})], {}).stages
            == parse(f"{ROUND.format(0.7)} + {ROUND.format(0.8)} + top_k k=1").stages
        )
    finally:
        del registry.METHODS["two_cuts"], registry.IMPLEMENTATIONS["two_cuts"]


def test_the_table_names_every_argument():
    rows = TEXT.partition("\n| argument of `@stage_preset` |")[2].partition("\n\n")[0]
    said = [name for row in re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert set(said) == registry.NEEDED["stage_preset"] | registry.ALLOWED["stage_preset"]
