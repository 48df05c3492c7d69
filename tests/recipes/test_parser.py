"""Recipes: three ways to write one, what overrides what, and an answer to every word that means nothing."""

from __future__ import annotations

import pytest

from moe_compress.methods import registry
from moe_compress.methods.registry import method
from moe_compress.recipes.parser import parse, split_words

KNOWN = "activations, block_drop, channels, densify, distill, expert_drop, "


def only(sentence: str, *overrides: str, **options: object) -> dict[str, object]:
    """The parameters of a recipe's one stage."""
    (stage,) = parse(sentence, overrides, options).stages
    return stage.parameters


@pytest.fixture
def thin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second method that takes `keep` too, for one test."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @method("model", group="test", paper="none")
    def thin_out(layers: object, *, keep: int = 4, width: float | None = None, must: str) -> None:
        """Exists for a test."""


def test_a_sentence_has_every_default_written_out():
    parameters = only("expert_drop score=ean")
    assert parameters == {
        "score": "ean",
        "keep": None,
        "ratio": 0.25,
        "budget": "layer",
        "propagate": "original",
        "novice": "none",
        "gate": "topk",
        "reverse": False,
        "protect": "none",
        "unseen": "drop",
        "evaluations": 100,
        "seed": 0,
    }
    options = parse("expert_drop").options
    assert (options.data, options.samples, options.length) == ("zoo", 64, 256)
    assert (options.eval_data, options.eval_length) == ("zoo", 256)


def test_models_from_elsewhere_use_the_field_s_own_texts():
    options = parse("expert_drop", options={"model": "mistralai/Mixtral-8x7B-v0.1"}).options
    assert (options.data, options.samples, options.length, options.eval_data) == ("c4", 128, 2048, "wikitext2")


def test_words_are_typed():
    parameters = only("expert_drop keep=6 reverse=true protect=0:1,2:3 seed=7")
    assert (parameters["keep"], parameters["reverse"], parameters["protect"]) == (6, True, "0:1,2:3")
    assert only("expert_drop ratio=1e-1")["ratio"] == 0.1
    assert only("expert_drop keep=none ratio=0.5")["ratio"] == 0.5


def test_stages_are_joined_by_plus():
    recipe = parse("expert_drop keep=6 score=ean + activations + expert_drop keep=4")
    assert [stage.method for stage in recipe.stages] == ["expert_drop", "activations", "expert_drop"]
    assert [stage.parameters.get("keep") for stage in recipe.stages] == [6, None, 4]


@pytest.mark.parametrize(
    "words",
    [
        ["expert_drop keep=6 score=ean", "samples=3"],
        ["expert_drop", "keep=6", "score=ean", "samples=3"],
        ["expert_drop score=ean", "samples=3", "keep=6"],
        ["expert_drop score=ean keep=6 samples=3"],
    ],
)
def test_quoted_and_unquoted_are_one(words):
    sentence, overrides = split_words(words)
    recipe = parse(sentence, overrides)
    assert recipe.stages[0].explicit_parameters == {"score": "ean", "keep": 6}
    assert recipe.options.samples == 3


def test_several_stages_without_quotes_take_all_words():
    sentence, overrides = split_words(["expert_drop", "keep=6", "+", "expert_drop", "keep=4", "out=my folder"])
    recipe = parse(sentence, overrides)
    assert [stage.parameters["keep"] for stage in recipe.stages] == [6, 4]
    assert recipe.options.out == "my folder"
    sentence, overrides = split_words(["expert_drop keep=6", "+", "activations"])
    assert [stage.method for stage in parse(sentence, overrides).stages] == ["expert_drop", "activations"]


def test_trailing_words_override():
    assert only("expert_drop score=reap ratio=0.25", "score=ean")["score"] == "ean"
    assert only("expert_drop", "expert_drop.score=ean")["score"] == "ean"
    assert only("expert_drop", "1.score=ean")["score"] == "ean"
    assert only("expert_drop", "score=ean", "score=man")["score"] == "man"


def test_options_by_keyword_yield_to_words():
    assert parse("expert_drop seed=1", options={"seed": 2}).options.seed == 2
    assert parse("expert_drop seed=1", ["seed=3"], {"seed": 2}).options.seed == 3


def test_a_rival_displaces_what_the_sentence_says():
    parameters = only("expert_drop score=reap ratio=0.25", "keep=6")
    assert (parameters["keep"], parameters["ratio"]) == (6, None)
    parameters = only("expert_drop keep=6", "ratio=0.5")
    assert (parameters["keep"], parameters["ratio"]) == (None, 0.5)
    assert only("expert_drop ratio=0.5", "keep=none")["ratio"] == 0.5


@pytest.mark.parametrize("words", [["expert_drop keep=6 ratio=0.5"], ["expert_drop", "keep=6", "ratio=0.5"]])
def test_rivals_side_by_side_are_an_error(words):
    with pytest.raises(ValueError, match="keep= or ratio=, not both"):
        parse(*split_words(words))


def test_a_preset_fills_in_what_is_not_said():
    paper = {"score": "gate_mass", "gate": "paper", "budget": "global", "ratio": 0.25}
    assert paper.items() <= only("expert_drop preset=paper").items()
    assert only("expert_drop preset=paper ratio=0.5")["ratio"] == 0.5
    parameters = only("expert_drop preset=paper keep=6")
    assert (parameters["keep"], parameters["ratio"], parameters["budget"]) == (6, None, "global")


def test_a_trailing_preset_overrides_the_script_s_own_words():
    script = "expert_drop score=reap budget=layer ratio=0.25"
    assert only(script, "preset=paper") == only("expert_drop preset=paper")
    assert only("expert_drop keep=4", "preset=paper")["keep"] is None
    for words in (["preset=paper", "ratio=0.5"], ["ratio=0.5", "preset=paper"]):
        assert only(script, *words) == only("expert_drop preset=paper ratio=0.5")


def test_one_seed_for_text_and_methods_unless_a_stage_has_its_own():
    recipe = parse("expert_drop + activations + expert_drop", ["seed=5", "1.seed=9"])
    assert recipe.options.seed == 5
    assert [stage.parameters.get("seed") for stage in recipe.stages] == [9, None, 5]


@pytest.mark.usefixtures("thin_out")
def test_a_key_of_two_stages_must_say_which():
    with pytest.raises(
        ValueError, match=r"keep= fits more than one stage: write expert_drop\.keep= or thin_out\.keep="
    ):
        parse("expert_drop + thin_out must=x", ["keep=6"])
    recipe = parse("expert_drop + thin_out must=x", ["thin_out.keep=6", "score=ean"])
    assert [stage.parameters["keep"] for stage in recipe.stages] == [None, 6]
    assert recipe.stages[0].parameters["score"] == "ean"


def test_two_stages_of_one_method_go_by_number():
    for word in ("keep=5", "expert_drop.keep=5"):
        with pytest.raises(ValueError, match=r"keep= fits more than one stage: write 1\.keep= or 2\.keep="):
            parse("expert_drop keep=6 + expert_drop keep=4", [word])
    recipe = parse("expert_drop keep=6 + expert_drop keep=4", ["1.keep=5"])
    assert [stage.parameters["keep"] for stage in recipe.stages] == [5, 4]


@pytest.mark.parametrize(
    ("sentence", "overrides", "said"),
    [
        ("exper_drop", [], rf"unknown method 'exper_drop': did you mean 'expert_drop'\? known: {KNOWN}"),
        ("expert_drop scor=reap", [], r"unknown key 'scor': did you mean 'score'\? known: .*ratio.*samples"),
        ("expert_drop", ["sampels=3"], r"unknown key 'sampels': did you mean 'samples'\?"),
        ("expert_drop score=reep", [], r"expert_drop\.score=reep: did you mean 'reap'\? allowed: random, "),
        ("expert_drop budget=loyer", [], r"expert_drop\.budget=loyer: did you mean 'layer'\?"),
        ("expert_drop preset=papre", [], r"expert_drop has no preset 'papre'; presets: naee, paper"),
        ("activations preset=paper", [], "unknown key 'preset'"),
        ("expert_drop keep=six", [], r"expert_drop\.keep=six: a whole number is needed"),
        ("expert_drop keep=6.5", [], r"expert_drop\.keep=6\.5: a whole number is needed"),
        ("expert_drop keep=", [], r"expert_drop\.keep=: a whole number is needed"),
        ("expert_drop ratio=25%", [], r"expert_drop\.ratio=25%: a number is needed"),
        ("expert_drop reverse=perhaps", [], r"expert_drop\.reverse=perhaps: allowed: true, false"),
        ("expert_drop keep=6 keep=5", [], "keep= is given twice"),
        ("expert_drop samples=3 samples=4", [], "samples= is given twice"),
        ("expert_drop keep", [], r"'keep' is not key=value; stages are joined by \+"),
        ("expert_drop +", [], "a method name is missing"),
        ("", [], "a method name is missing"),
        ("expert_drop out='x", [], "a quotation mark too many or too few"),
        ("expert_drop", ["foo.keep=3"], r"foo\.keep=3: the recipe has no stage 'foo'; stages: expert_drop"),
        ("expert_drop", ["2.keep=3"], r"the recipe has no stage '2'"),
        ("expert_drop", ["expert_drop.kep=3"], r"expert_drop has no parameter 'kep'\. Did you mean 'keep'\?"),
        ("expert_drop", ["samples=-1"], "samples=-1: a number from 0 to"),
        ("expert_drop", ["samples=many"], "samples=many: a whole number is needed"),
        ("expert_drop", ["eval=maybe"], "eval=maybe: allowed: true, false"),
        ("expert_drop", ["seed=-1"], "seed=-1: a number from 0 to"),
        ("expert_drop", [f"seed={10**30}"], "a number from 0 to"),
        ("expert_drop", ["threads=1000000000"], "threads=1000000000: a number from 1 to 1024 is needed"),
        ("expert_drop", ["name=" + "x" * 300], "a name of at most 200 bytes"),
        ("expert_drop", ["name=a\0b"], "a name of at most 200 bytes"),
        ("expert_drop", ["out=results/" + "x" * 250], "a name of at most 200 bytes"),
        ("+ expert_drop", [], "a method name is missing"),
        ("expert_drop + + expert_drop", [], "a method name is missing"),
        ("expert_drop", ["threads=0"], "threads=0: a number from 1 to 1024 is needed"),
        ("expert_drop", ["name=a/b"], "name=a/b: a record's name has no `/`"),
    ],
)
def test_mistakes_are_answered(sentence, overrides, said):
    with pytest.raises(ValueError, match=said):
        parse(sentence, overrides)


def test_no_words_name_the_methods():
    with pytest.raises(ValueError, match=f"names no method; methods: {KNOWN}"):
        split_words([])


@pytest.mark.usefixtures("thin_out")
def test_a_parameter_without_default_must_be_given():
    with pytest.raises(ValueError, match="thin_out needs must="):
        parse("thin_out")
    assert only("thin_out must=x width=0.5")["width"] == 0.5
