"""Recipes as YAML files."""

from __future__ import annotations

import pytest
import yaml

from moe_compress.recipes.parser import parse
from moe_compress.run.options import Options, make_options
from moe_compress.utils.files import read_json


@pytest.mark.parametrize(
    "sentence",
    [
        "expert_drop score=ean keep=6 samples=3 seed=4",
        "expert_drop preset=paper",
        "expert_drop ratio=0.1 protect=1:3,2:4 unseen=keep reverse=true",
        "expert_drop keep=6 + activations + expert_drop ratio=0.5 mix=prose:2,code:1 pack=false",
    ],
)
def test_a_recipe_survives_its_yaml(sentence, tmp_path):
    recipe = parse(sentence, ["1.seed=9"] if "+" not in sentence else ["3.seed=9"])
    path = tmp_path / "my recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert parse(str(path)) == recipe
    unset = {name for name, option in Options.model_fields.items() if option.exclude_if}  # came later
    unset |= {"out", "name", "results", "trust_remote_code"}
    assert set(yaml.safe_load(recipe.to_yaml())) == {"stages", *Options.model_fields} - unset


def test_words_override_yaml_too(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(parse("expert_drop keep=6 samples=3").to_yaml(), encoding="utf-8")
    recipe = parse(str(path), ["ratio=0.5", "seed=7"], {"samples": 4})
    assert recipe.stages[0].explicit_parameters == {"score": "reap", "ratio": 0.5, "seed": 7}
    assert (recipe.options.samples, recipe.options.seed) == (4, 7)


def test_yaml_may_be_short(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: [activations, {expert_drop: {keep: 6, reverse: true}}]\nsamples: 5\n", encoding="utf-8")
    recipe = parse(str(path))
    assert recipe.stages[1].explicit_parameters == {"score": "reap", "keep": 6, "reverse": True}
    assert recipe.options.samples == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [", "is not valid YAML"),
        ("stages: [\x00]", "is not valid YAML"),
        ("just words", "needs a list under `stages:`"),
        ("stages: []", "names no method"),
        ("stages: [3]", "a stage is one method with its parameters, not 3"),
        ("stages: [{3: {}}]", "a stage is one method"),
        ("stages: [{expert_drop: 6}]", "a stage is one method"),
        ("stages: [{expert_drop: {}, activations: {}}]", "a stage is one method"),
        ("stages: [exper_drop]", "did you mean 'expert_drop'"),
        ("stages: [{expert_drop: {kep: 6}}]", "Did you mean 'keep'"),
        ("stages: [{expert_drop: {6: keep}}]", "has no parameter '6'"),
        ("stages: [{expert_drop: {keep: 6.5}}]", "a whole number is needed"),
        ("stages: [{expert_drop: {keep: true}}]", "a whole number is needed"),
        ("stages: [{expert_drop: {keep: [6]}}]", "one word or number is needed"),
        ("stages: [{expert_drop: {score: 3}}]", "allowed: random"),
        ("stages: [{expert_drop: {score: null}}]", "one word or number is needed"),
        ("stages: [{expert_drop: {keep: 6, ratio: 0.5}}]", "not both"),
        ("stages: [activations]\nsampels: 3", "did you mean 'samples'"),
        ("stages: [activations]\nsamples: {a: 1}", "one word or number is needed"),
    ],
)
def test_broken_yaml_is_answered(text, said, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        parse(str(path))


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no recipe file .*none\.yaml"):
        parse(str(tmp_path / "none.yaml"))


def test_a_checkpoint_made_from_a_zoo_model_has_the_zoos_defaults(tmp_path):
    (tmp_path / "moe_compress.json").write_text('{"base": {"model": "tiny-mixtral"}}')
    assert make_options({"model": str(tmp_path)}).resolved().data == "zoo"
    (tmp_path / "moe_compress.json").write_text("broken")
    assert make_options({"model": str(tmp_path)}).resolved().data == "c4"


def test_a_key_is_there_once(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages:\n  - expert_drop: {keep: 6, keep: 5}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe.yaml is not valid YAML: 'keep' is there twice"):
        parse(str(tmp_path / "recipe.yaml"))
    (tmp_path / "config.json").write_text('{"a": {"b": 1, "b": 1}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \('b' is there twice\)"):
        read_json(tmp_path / "config.json")
