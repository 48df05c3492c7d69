"""Recipes: a model, stages, text and a seed, validated and complete before a byte of weights is read.

    expert_drop score=reap keep=6 + expert_drop keep=4

is a recipe; words that follow it override (`samples=32`, `expert_drop.keep=5` where a key fits several stages).
The same as YAML: `{model: ..., stages: [{expert_drop: {score: reap, keep: 6}}], samples: 32}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_compress import methods, registry, zoo

methods.register_all()


class Stage(BaseModel):
    """One method with all of its parameters, and those that differ from the method's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    parameters: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that say something: the method's headline, and what is set and not at its default."""
        method = registry.find(self.method)
        return {
            key: value
            for key, value in self.parameters.items()
            if value is not None and (key in method.headline or value != method.parameters[key].default)
        }

    @property
    def needs(self) -> registry.Need:
        """What the stage must see."""
        return registry.find(self.method).needs(self.parameters)


class Options(BaseModel):
    """What belongs to the run and to no single stage. 0 and empty mean: the default for this model.

    model: zoo name, local folder or hub id; revision: hub branch, tag or commit; data, samples, length, pack, mix
    and data_*: the calibration text; eval_*: the evaluation text (eval=false: none); seed: of the text's order and
    of every method that draws; dtype, device, attn: the arithmetic; out: the checkpoint's folder; name: the record's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = "tiny-mixtral"
    revision: str | None = None
    data: str = ""
    data_config: str | None = None
    data_split: str | None = None
    data_field: str = "text"
    samples: int = 0
    length: int = 0
    pack: bool = True
    mix: str = ""
    eval: bool = True
    eval_data: str = ""
    eval_config: str | None = None
    eval_split: str | None = None
    eval_field: str = "text"
    eval_samples: int = 0
    eval_length: int = 0
    resident: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    threads: int | None = None
    out: str = ""
    name: str = ""
    results: str = "results"

    def resolved(self) -> Options:
        """Every default written out. Zoo models use the zoo's own text in short windows, others C4 and WikiText-2."""
        small = self.model in zoo.NAMES
        filled: dict[str, Any] = {
            "data": self.data or ("zoo" if small else "c4"),
            "samples": self.samples or (64 if small else 128),
            "length": self.length or (256 if small else 2048),
            "eval_data": self.eval_data or ("zoo" if small else "wikitext2"),
            "eval_samples": self.eval_samples or (216 if small else 128),
            "eval_length": self.eval_length or (256 if small else 2048),
        }
        return self.model_copy(update=filled)


class Recipe(BaseModel):
    """Stages and options; everything a run depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stages: list[Stage]
    options: Options

    def to_yaml(self) -> str:
        """The recipe as a YAML file that rebuilds the checkpoint."""
        stages = [{stage.method: stage.parameters} for stage in self.stages]
        options = self.options.model_dump(exclude={"out", "name", "results"})
        return yaml.safe_dump({"stages": stages, **options}, sort_keys=False)


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Command-line words -> (sentence or recipe file, overrides).

    `"expert_drop keep=6 + expert_drop keep=4" samples=32` and `expert_drop keep=6 samples=32` both work; a sentence
    of several stages without quotes takes all words.
    """
    if not words:
        raise ValueError(f"the recipe names no method; methods: {', '.join(sorted(registry.METHODS))}.")
    if "+" in words:
        return " ".join(words), []
    return words[0], list(words[1:])


def parse(sentence: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """A complete recipe from a sentence or a .yaml file, overrides (`key=value`) and options.

    Raises ValueError, with what would have worked, for anything unknown or ambiguous.
    """
    chosen: dict[str, Any] = {}
    if sentence.endswith((".yaml", ".yml")):
        stages, chosen = _read_yaml(Path(sentence))
    else:
        stages = _sentence(sentence.split(), chosen)
    chosen |= options or {}
    for word in overrides:
        _override(word, stages, chosen)
    return build(stages, chosen)


def build(stages: Sequence[tuple[str, Mapping[str, Any]]], options: Mapping[str, Any]) -> Recipe:
    """A complete recipe from stages and options, as given by any of the three ways to write one."""
    if not stages:
        raise ValueError(f"the recipe names no method; methods: {', '.join(sorted(registry.METHODS))}.")
    try:
        parsed = Options.model_validate(dict(options)).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}={first['input']}: {first['msg']}.") from error
    bound = []
    for name, given in stages:
        method = registry.find(name)
        with_seed = {"seed": parsed.seed, **given} if "seed" in method.parameters else given
        bound.append(Stage(method=name, parameters=method.bind(with_seed)))
    return Recipe(stages=bound, options=parsed)


def _sentence(words: Sequence[str], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    stages: list[tuple[str, dict[str, Any]]] = []
    expect_method = True
    for word in words:
        if word == "+":
            expect_method = True
        elif expect_method:
            registry.find(word)
            stages.append((word, {}))
            expect_method = False
        else:
            key, value = _key_value(word)
            _put(key, value, stages[-1:], options, replace=False)
    if expect_method:
        raise ValueError("a method name is missing in the recipe: write `method key=value + method key=value`.")
    return stages


def _override(word: str, stages: list[tuple[str, dict[str, Any]]], options: dict[str, Any]) -> None:
    key, value = _key_value(word)
    name, dot, parameter = key.partition(".")
    if dot:
        named = [stage for stage in stages if stage[0] == name]
        if not named:
            raise ValueError(f"{word}: the recipe has no stage {name!r}; stages: {', '.join(s[0] for s in stages)}.")
        _put(parameter, value, named, {}, replace=True, only_stages=True)
    else:
        _put(key, value, stages, options, replace=True)


def _key_value(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r} is not key=value; stages are joined by +.")
    return key, value


def _put(
    key: str,
    value: str,
    stages: Sequence[tuple[str, dict[str, Any]]],
    options: dict[str, Any],
    *,
    replace: bool,
    only_stages: bool = False,
) -> None:
    """Give a value to the one stage or option whose key it is."""
    takers = [(registry.find(name), given) for name, given in stages]
    takers = [(method, given) for method, given in takers if key in method.parameters or key == "preset"]
    if key in Options.model_fields and not only_stages:
        options[key] = value
    elif len(takers) > 1:
        names = " or ".join(f"{name}.{key}" for name in sorted({name for name, _ in stages}))
        raise ValueError(f"{key}= fits more than one stage: write {names}.")
    elif not takers:
        raise ValueError(_unknown_key(key, stages))
    elif key in takers[0][1] and not replace:
        raise ValueError(f"{key}= is given twice in one stage.")
    else:
        method, given = takers[0]
        for rival in method.rivals_of(key) if replace else ():
            given.pop(rival, None)
        given[key] = value


def _unknown_key(key: str, stages: Sequence[tuple[str, dict[str, Any]]]) -> str:
    known = [*Options.model_fields, *(p for name, _ in stages for p in registry.find(name).parameters)]
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}: {hint}known: {', '.join(known)}."


def option_pairs(words: Sequence[str]) -> dict[str, str]:
    """Options from `key=value` words; ValueError for a key that is none (`original` belongs to evaluate)."""
    pairs = dict(_key_value(word) for word in words)
    for key in pairs:
        if key not in Options.model_fields and key != "original":
            raise ValueError(_unknown_key(key, []))
    return pairs


def _read_yaml(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no recipe file {path}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ValueError(f"{path} needs a list under `stages:`, such as `- expert_drop: {{keep: 6}}`.")
    stages = []
    for entry in content.pop("stages"):
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(f"{path}: a stage is one method with its parameters, not {entry!r}.")
        name, given = next(iter(entry.items()))
        stages.append((name, dict(given or {})))
    unknown = [key for key in content if key not in Options.model_fields]
    if unknown:
        raise ValueError(_unknown_key(unknown[0], []))
    return stages, content
