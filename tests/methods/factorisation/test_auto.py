"""auto takes what loses least: a core for related experts, ranks of their own for unrelated ones."""

from __future__ import annotations

import pytest

from moe_compress.methods.factorisation.auto import best_structure
from moe_compress.methods.factorisation.sizes import size_for
from moe_compress.methods.factorisation.solve import errors
from support.experts import experts, grams

CHOICE = ["svd", "base_delta", "shared_basis", "basis_mixture"]


@pytest.mark.parametrize(("common", "expected"), [(0.0, "svd"), (0.5, "base_delta")])
def test_planted_relations_decide(common: float, expected: str) -> None:
    weight, gram = experts(8, 48, 32, common), grams(8, 32)
    sizes = {structure: size_for(structure, 8, 48, 32, ratio=0.35) for structure in CHOICE}
    found = best_structure(weight, gram, sizes)
    tried = found.tried
    assert found.structure == expected and [*tried] == CHOICE and min(tried, key=lambda one: tried[one]) == expected
    assert errors(weight, found.factors, gram) == (found.plain, found.whitened) and found.whitened == tried[expected]


def test_none_to_choose_from() -> None:
    with pytest.raises(ValueError, match="none to choose from"):
        best_structure(experts(2, 8, 8), None, {})
