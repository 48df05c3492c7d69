"""A method is registered once, and what its source declares is what it has once it is imported."""

from __future__ import annotations

import pytest

import moe_compress
from moe_compress.evaluation.harnesses import harness
from moe_compress.methods import registry
from moe_compress.methods.registry import method, weight_method
from moe_compress.methods.score_registry import NAMES, score, scores
from moe_compress.recipes.parser import parse
from moe_compress.utils.declarations import REQUIRED, of_function


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


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("prune spread=0.3", "prune.spread=0.3 would do nothing: it goes with another allocate= than uniform."),
        (
            "factorise structure=svd bases=4",
            "factorise.bases=4 would do nothing: it goes with structure=basis_mixture or",
        ),
        ("factorise structure=svd sweeps=2", "it goes with another structure= than svd and another solver= than adam."),
        ("factorise lr=0.1", "lr=0.1 would do nothing: it goes with solver=adam, or another activation= than linear."),
        (
            "factorise structure=sparse_low_rank pattern=2:4 sparse=0.3",
            "structure=sparse_low_rank or auto and no pattern=",
        ),
        ("factorise rank=4 multiple=8", "it goes with no rank=."),
        ("expert_drop gate=full", "expert_drop.gate=full would do nothing: it goes with score=gate_mass."),
        ("expert_drop evaluations=9", "it goes with budget=search."),
        ("expert_merge grouping=ream linkage=single", "it goes with grouping=hc_smoe."),
        ("layer_drop layers=1 metric=without_norm", "it goes with no layers=."),
        ("block_drop layers=1 mode=consecutive", "it goes with no layers=."),
        ("top_k k=1 on=noise", "top_k.on=noise would do nothing: it goes with mean=."),
        ("channels score=wanda alpha=0.1", "it goes with score=camera."),
        ("quantize per=layer", "quantize.per=layer would do nothing: it goes with bits=auto."),
        ("quantize method=awq damping=0.1", "it goes with method=gptq."),
        ("quantize scales=free", "it goes with method=awq."),
        ("quantize format=fp8 clip=signed", "quantize.clip=signed would do nothing: it goes with another format= than"),
    ],
)
def test_words_that_others_make_meaningless(sentence, said):
    with pytest.raises(ValueError) as caught:
        parse(sentence)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_word_at_its_default_goes_with_everything(name):
    """Recipes that checkpoints carry say every word."""
    method = registry.METHODS[name]
    bound = method.bind({key: 1 for key, each in method.parameters.items() if each.default is REQUIRED})
    assert method.bind(bound) == bound


def test_what_a_preset_says_gives_way():
    stage = parse("expert_drop preset=paper score=reap").stages[0]
    assert (
        stage.parameters["gate"] == "topk" and parse("expert_drop preset=paper").stages[0].parameters["gate"] == "paper"
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "prune method=magnitude shrink=2",
        "expert_drop score=weight_norm unseen=keep",
        "quantize method=rtn propagate=original",
        "factorise objective=plain experts_at_once=2",
    ],
)
def test_words_about_text_that_is_not_looked_at(sentence):
    word = sentence.rpartition(" ")[2]
    with pytest.raises(ValueError, match=f"^{word}[.0]* would do nothing: with its other words .* looks at no text"):
        moe_compress.plan(sentence, model="tiny-mixtral")


def test_rules_name_parameters(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    with pytest.raises(ValueError, match="goes_with of half_said names 'ranks', which is no parameter of it"):
        says(goes_with={"rank": "ranks=1"})


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
