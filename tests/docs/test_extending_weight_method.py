"""docs/extending/weight_method.md: its example is a method like any other, in the package and outside of it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable

import pytest
import torch

import moe_compress
from moe_compress.cli.catalogue import method_markdown
from moe_compress.methods import registry
from moe_compress.methods.registry import Method
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.methods.weight_method import MatrixGroup, NewMatrices
from moe_compress.recipes.parser import parse
from moe_compress.utils.declarations import declarations
from support.pages import DOCS, commands, require_command, table_words

TEXT = (DOCS / "extending" / "weight_method.md").read_text(encoding="utf-8")


@pytest.fixture
def example(in_package: Callable[[str], str]) -> str:
    """The page's file in the package, and the table of methods read anew, as it is at import."""
    name = in_package("weight_method")
    registry.METHODS.update({d.name: registry._method(d) for d in declarations(registry.PACKAGE, "weight_method")})
    return name


def test_it_is_known_before_it_is_imported(example):
    for words in commands(TEXT):
        require_command(words[2:])
    shown = method_markdown("low_rank")
    assert "- `rank=8`: whole number" in shown and "- `unseen=pooled`: pooled, dense, error" in shown
    assert list(registry.METHODS["low_rank"].parameters)[:4] == ["rank", "weighted", "where", "spare"]
    assert "allocate" not in registry.METHODS["low_rank"].parameters
    assert example not in sys.modules
    needs = registry.find("low_rank").needs
    assert [needs({"weighted": each}) for each in (True, False)] == ["input_squares", "nothing"]


def test_every_matrix_is_the_nearest_of_its_rank(example):
    weight_BOI, square_BI = torch.randn(3, 12, 16), torch.rand(3, 16)
    square_BI[1, :4] = 0
    changed = registry.find("low_rank").run(MatrixGroup(["a", "b", "c"], [weight_BOI], square_BI), rank=3)
    for before_OI, after_OI, square_I in zip(weight_BOI, changed.weights[0], square_BI, strict=True):
        assert torch.linalg.matrix_rank(after_OI, rtol=1e-4) == 3
        size_I = square_I.sqrt().clamp_min(1e-3)
        least = torch.linalg.svdvals(before_OI * size_I)[3:].square().sum().sqrt()
        found = ((before_OI - after_OI) * size_I).norm()
        torch.testing.assert_close(found, least, rtol=1e-2, atol=0)


def test_it_changes_a_checkpoint_end_to_end(example, lab):
    given = lab("mixtral")
    result = moe_compress.compress("low_rank rank=4 where=experts,attention unseen=dense", **given)
    before, after = (moe_compress.load(str(each)).state_dict() for each in (given["model"], result.folder))
    for name, weight in after.items():
        changed = ".experts." in name or "self_attn" in name
        assert torch.equal(weight, before[name]) != changed, name
    attention = after["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(attention, rtol=1e-4) == 4


def test_a_rank_that_cannot_be_is_refused_before_anything_runs(example, lab, forwards):
    with pytest.raises(ValueError, match=r"rank=1000: .* of layer 0 has a rank of at most"):
        moe_compress.compress("low_rank rank=1000", **lab("mixtral"))
    assert not forwards


def test_a_module_of_ones_own_is_enough(elsewhere, lab):
    with pytest.raises(ValueError, match="unknown method 'low_rank'"):
        parse("low_rank")
    elsewhere("weight_method", "my_methods")
    result = moe_compress.compress("low_rank rank=4 weighted=false + expert_drop keep=6", **lab("mixtral"))
    assert moe_compress.load(str(result.folder)).config.num_local_experts == 6


def test_the_tables_name_every_argument_and_field():
    own = {field.name for field in dataclasses.fields(Method)}
    own -= {"name", "scope", "declaration", "parameters", "breaks_patterns"}
    arguments = set(inspect.signature(registry.weight_method).parameters) - {"said"}
    said = {"unseen", "min_tokens", "allocates", "selection_after"}
    assert set(table_words(TEXT, "argument of `@weight_method`")) == own | arguments | said
    assert set(table_words(TEXT, "parameter")) == {field.name for field in dataclasses.fields(WeightStageOptions)}
    assert set(table_words(TEXT, "of `MatrixGroup`")) == {field.name for field in dataclasses.fields(MatrixGroup)}
    assert f"NewMatrices({', '.join(field.name for field in dataclasses.fields(NewMatrices))})" in TEXT
