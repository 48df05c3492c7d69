"""A method is registered once, and what its source declares is what it has once it is imported."""

from __future__ import annotations

import pytest

from moe_compress.evaluation.harnesses import harness
from moe_compress.methods import registry
from moe_compress.methods.registry import method, weight_method
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


def says(**words: object) -> None:
    """Registers a weight method that says these things of itself."""
    given = {"group": "slimming", "paper": "none", "unseen": ("pooled",), "selection_after": "rank", "needs": "nothing"}

    @weight_method(**{key: value for key, value in {**given, **words}.items() if value is not None})
    def half_said(group: object, *, rank: int = 1) -> None:
        """Says too much or too little."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"quantises": True}, "has no keyword 'quantises'; it takes: "),
        ({"unseen": None}, "needs unseen="),
        ({"quantizes": True}, "quantizes=True and grid= go together"),
        ({"allocates": "rank"}, "allocates='rank' needs trial="),
    ],
)
def test_a_weight_method_says_neither_too_much_nor_too_little(words, said, monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    with pytest.raises(ValueError, match=said):
        says(**words)


def test_a_harness_is_registered_once():
    with pytest.raises(ValueError, match="'speed' is registered twice"):

        @harness("speed")
        def fast(checkpoint: str) -> None:
            """Is there already."""
