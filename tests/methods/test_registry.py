"""A method is registered once."""

from __future__ import annotations

import pytest

from moe_compress.methods.registry import method


def test_a_method_is_registered_once():
    with pytest.raises(ValueError, match="'identity' is registered twice"):

        @method("layer", group="test", paper="none")
        def identity() -> None:
            """Is there already."""
