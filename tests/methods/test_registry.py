"""A method is registered once, and what its source declares is what it has once it is imported."""

from __future__ import annotations

import pytest

from moe_compress.methods import registry
from moe_compress.methods.registry import method
from moe_compress.methods.score_registry import NAMES, score, scores
from moe_compress.utils.declarations import of_function


def test_a_method_is_registered_once():
    registry.find("activations").implementation  # noqa: B018 - imports its module
    with pytest.raises(ValueError, match="'activations' is registered twice"):

        @method("model", group="test", paper="none")
        def activations() -> None:
            """Is there already."""


@pytest.mark.parametrize("name", registry.METHODS)
def test_what_the_source_declares_is_what_is_imported(name):
    found = registry.METHODS[name]
    of_source, imported = found.declaration.parameters, of_function(found.run, "").parameters
    assert list(of_source.items()) == list(imported.items())
    assert found.declaration.doc == of_function(found.run, "").doc


def test_the_choices_of_a_score_are_the_registered_ones():
    assert set(NAMES.names()) == set(scores())
    with pytest.raises(ValueError, match="'reap' is registered twice"):
        score("reap", needs="text")(lambda sums: sums["count"])
