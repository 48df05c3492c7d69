"""Recipes as people write them: a sentence, a YAML file, and words that override.

    expert_drop score=reap keep=6 + expert_drop keep=4

is a recipe; words that follow it override: `samples=32`, and where a key fits several stages `expert_drop.keep=5` or,
by the stage's number, `2.keep=5`.
The same as YAML: `{model: ..., stages: [{expert_drop: {score: reap, keep: 6}}], samples: 32}`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.methods import registry
from moe_compress.recipes.recipe import Recipe, build
from moe_compress.run.options import Options
from moe_compress.utils.choices import key_value, unknown_key
from moe_compress.utils.files import read_text
from moe_compress.utils.yaml_text import parse_yaml


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Command-line words -> (sentence or recipe file, overrides).

    `"expert_drop keep=6 + expert_drop keep=4" samples=32` and `expert_drop keep=6 samples=32` both work; a sentence
    of several stages without quotes takes all words.
    """
    if not words:
        raise ValueError(f"the recipe names no method; methods: {', '.join(sorted(registry.METHODS))}.")
    if "+" in words:
        return " ".join(word if " " in word.partition("=")[0] else shlex.quote(word) for word in words), []
    return words[0], list(words[1:])


def parse(sentence: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """A complete recipe from a sentence or a .yaml file, overrides (`key=value`) and options.

    Raises ValueError, with what would have worked, for anything unknown or ambiguous.
    """
    chosen: dict[str, Any] = {}
    if sentence.endswith((".yaml", ".yml")):
        stages, chosen = _read_yaml(Path(sentence))
    else:
        stages = _sentence(_words(sentence), chosen)
    chosen |= options or {}
    _override(overrides, stages, chosen)
    return build([(stage.method, stage.given) for stage in stages], chosen)


@dataclass
class _Draft:
    """A stage as it was written: its number in the recipe, and the text of its parameters."""

    number: int
    method: str
    given: dict[str, Any] = field(default_factory=dict)

    def takes(self, key: str) -> bool:
        """Whether the stage has such a parameter."""
        method = registry.find(self.method)
        return key in method.parameters or (key == "preset" and bool(method.presets))


def _words(sentence: str) -> list[str]:
    try:
        return shlex.split(sentence)
    except ValueError as error:
        raise ValueError(f"the recipe {sentence} has a quotation mark too many or too few.") from error


def _sentence(words: Sequence[str], options: dict[str, Any]) -> list[_Draft]:
    stages: list[_Draft] = []
    expect_method = True
    for word in words:
        if word == "+" and expect_method:
            break
        if word == "+":
            expect_method = True
        elif expect_method:
            registry.find(word)
            stages.append(_Draft(len(stages) + 1, word))
            expect_method = False
        else:
            key, value = key_value(word)
            target = _target(key, stages[-1:], options)
            if key in target:
                raise ValueError(f"{key}= is given twice.")
            target[key] = value
    if expect_method:
        raise ValueError("a method name is missing in the recipe: write `method key=value + method key=value`.")
    return stages


def _override(words: Sequence[str], stages: Sequence[_Draft], options: dict[str, Any]) -> None:
    """Let trailing words replace what the recipe says, and what cannot stand beside them."""
    trailing = [_Draft(stage.number, stage.method) for stage in stages]
    for word in words:
        key, value = key_value(word)
        label, dot, parameter = key.rpartition(".")
        if dot:
            named = [draft for draft in trailing if label in (draft.method, str(draft.number))]
            if not named:
                raise ValueError(f"{word}: the recipe has no stage {label!r}; {_stages_of(trailing)}")
            if not named[0].takes(parameter):
                raise ValueError(registry.find(named[0].method).unknown(parameter))
            _target(parameter, named, None)[parameter] = value
        else:
            _target(key, trailing, options)[key] = value
    for stage, later in zip(stages, trailing, strict=True):
        for key in registry.find(stage.method).displaced_by(later.given):
            stage.given.pop(key, None)
        stage.given |= later.given


def _stages_of(drafts: Sequence[_Draft]) -> str:
    """Which stages a recipe has, as they were written."""
    preset = next((each.method for each in drafts if registry.find(each.method).scope == "stages"), None)
    apart = "" if preset is None else f" For words of one stage of {preset} alone, write its stages out."
    return f"stages: {', '.join(each.method for each in drafts)}.{apart}"


def _target(key: str, stages: Sequence[_Draft], options: dict[str, Any] | None) -> dict[str, Any]:
    """What the key belongs to: the options (if they may be set here), or the one stage that has it."""
    if options is not None and key in Options.model_fields:
        return options
    takers = [stage for stage in stages if stage.takes(key)]
    if len(takers) == 1:
        return takers[0].given
    if not takers:
        raise ValueError(_unknown_key(key, stages))
    names = [stage.method for stage in takers]
    labels = names if len(set(names)) == len(names) else [str(stage.number) for stage in takers]
    raise ValueError(f"{key}= fits more than one stage: write {' or '.join(f'{label}.{key}=' for label in labels)}.")


def _unknown_key(key: str, stages: Sequence[_Draft]) -> str:
    parameters = [name for stage in stages for name in registry.find(stage.method).parameters]
    known = list(dict.fromkeys([*parameters, *Options.model_fields]))
    return unknown_key(key, known)


def _read_yaml(path: Path) -> tuple[list[_Draft], dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"there is no recipe file {path}.")
    content = parse_yaml(read_text(path), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ValueError(f"{path} needs a list under `stages:`, such as `- expert_drop: {{keep: 6}}`.")
    stages = []
    for number, entry in enumerate(content.pop("stages"), 1):
        one = {entry: {}} if isinstance(entry, str) else entry
        match [*one.items()] if isinstance(one, dict) else []:
            case [(str(name), dict() | None as given)]:
                stages.append(_Draft(number, name, {str(key): value for key, value in (given or {}).items()}))
            case _:
                raise ValueError(f"{path}: a stage is one method with its parameters, not {entry!r}.")
    if "trust_remote_code" in content:
        raise ValueError(f"{path}: trust_remote_code is said on the command line, not by a recipe file.")
    return stages, {str(key): value for key, value in content.items()}
