"""Words become values of the annotated type, or are named."""

from __future__ import annotations

from typing import Annotated

import pytest

from moe_compress.utils.choices import AtLeast, Means, coerce

COUNT = Annotated[Annotated[int, AtLeast(1)] | None, Means("none: all")]


@pytest.mark.parametrize(
    ("hint", "value", "typed"),
    [
        (int, "3", 3), (float, 1, 1.0), (float | None, None, None), (int | None, "none", None), (bool, True, True),
        (COUNT, None, None), (COUNT, "2", 2), (Annotated[int | None, Means("none: all")], None, None),
    ],
)  # fmt: skip
def test_values_become_what_is_annotated(hint, value, typed):
    got = coerce(hint, value, "x")
    assert got == typed and type(got) is type(typed)


@pytest.mark.parametrize(("hint", "value"), [(int, [3]), (str, {"a": 1}), (int, None), (int, True), (int, 6.0)])
def test_values_that_do_not_fit_are_named(hint, value):
    with pytest.raises(ValueError, match="x="):
        coerce(hint, value, "x")
