"""Recipes: a model, stages, text and a seed, validated and complete before a byte of weights is read.

    expert_drop score=reap keep=6 + expert_drop keep=4

is a recipe; words that follow it override: `samples=32`, and where a key fits several stages `expert_drop.keep=5` or,
by the stage's number, `2.keep=5`.
The same as YAML: `{model: ..., stages: [{expert_drop: {score: reap, keep: 6}}], samples: 32}`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from moe_compress import methods, registry, zoo

methods.register_all()

COUNTS = ("samples", "length", "eval_samples", "eval_length")
LIMITS = {**dict.fromkeys((*COUNTS, "seed"), (0, 2**31 - 1)), "threads": (1, 1024)}
MAX_NAME = 200  # bytes; file systems allow 255, and endings such as `.stage1.partial` come behind


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
    results: str = "runs"

    def resolved(self) -> Options:
        """Every default written out. Zoo models use the zoo's own text in short windows, others C4 and WikiText-2."""
        small = zoo.descends_from(self.model)
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
        """The recipe as a YAML file that rebuilds the checkpoint; a stage's seed only where it is not the run's."""
        seed = self.options.seed
        stages = [
            {stage.method: {k: v for k, v in stage.parameters.items() if (k, v) != ("seed", seed)}}
            for stage in self.stages
        ]
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


def build(stages: Sequence[tuple[str, Mapping[str, Any]]], options: Mapping[str, Any]) -> Recipe:
    """A complete recipe from stages and options, as given by any of the three ways to write one."""
    if not stages:
        raise ValueError(f"the recipe names no method; methods: {', '.join(sorted(registry.METHODS))}.")
    complete = make_options(options).resolved()
    bound = []
    for name, given in stages:
        method = registry.find(name)
        with_seed = {"seed": complete.seed, **given} if "seed" in method.parameters else given
        bound.append(Stage(method=name, parameters=method.bind(with_seed)))
    return Recipe(stages=bound, options=complete)


def make_options(given: Mapping[str, Any]) -> Options:
    """Typed options from words or Python values; ValueError says what would have worked."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in Options.model_fields:
            raise ValueError(_unknown_key(key, []))
        values[key] = registry.coerce(Options.model_fields[key].annotation, value, key)
    options = Options(**values)
    for key, (least, most) in LIMITS.items():
        if (value := getattr(options, key)) is not None and not least <= value <= most:
            raise ValueError(f"{key}={value}: a number from {least} to {most} is needed.")
    for key in ("name", "out", "results"):
        name = Path(getattr(options, key)).name
        if "\0" in name or len(name.encode(errors="surrogateescape")) > MAX_NAME:
            raise ValueError(f"{key}={name[:40]!r}...: a name of at most {MAX_NAME} bytes, none of them 0, is needed.")
    if "/" in options.name:
        raise ValueError(f"name={options.name}: a record's name has no `/`; the checkpoint's folder is out=.")
    return options


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
            key, value = _key_value(word)
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
        key, value = _key_value(word)
        label, dot, parameter = key.rpartition(".")
        if dot:
            named = [draft for draft in trailing if label in (draft.method, str(draft.number))]
            if not named:
                names = ", ".join(draft.method for draft in trailing)
                raise ValueError(f"{word}: the recipe has no stage {label!r}; stages: {names}.")
            if not named[0].takes(parameter):
                raise ValueError(registry.find(named[0].method).unknown(parameter))
            _target(parameter, named, None)[parameter] = value
        else:
            _target(key, trailing, options)[key] = value
    for stage, later in zip(stages, trailing, strict=True):
        for key in registry.find(stage.method).displaced_by(later.given):
            stage.given.pop(key, None)
        stage.given |= later.given


def _key_value(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r} is not key=value; stages are joined by +.")
    return key, value


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


def option_pairs(words: Sequence[str]) -> dict[str, str]:
    """Options from `key=value` words."""
    return dict(_key_value(word) for word in words)


def _unknown_key(key: str, stages: Sequence[_Draft]) -> str:
    parameters = [name for stage in stages for name in registry.find(stage.method).parameters]
    known = list(dict.fromkeys([*parameters, *Options.model_fields]))
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}: {hint}known: {', '.join(known)}."


def _read_yaml(path: Path) -> tuple[list[_Draft], dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no recipe file {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
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
    return stages, {str(key): value for key, value in content.items()}
