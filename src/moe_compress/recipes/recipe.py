"""Recipes: a model, stages, text and a seed, validated and complete before a byte of weights is read.

    expert_drop score=reap keep=6 + expert_drop keep=4

is a recipe; words that follow it override: `samples=32`, and where a key fits several stages `expert_drop.keep=5` or,
by the stage's number, `2.keep=5`.
The same as YAML: `{model: ..., stages: [{expert_drop: {score: reap, keep: 6}}], samples: 32}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from moe_compress.methods import registry
from moe_compress.methods.stage_options import FOLLOWED
from moe_compress.run.options import Options, make_options


class Stage(BaseModel):
    """One method with all of its parameters, and those that differ from the method's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    parameters: dict[str, Any]

    @property
    def explicit_parameters(self) -> dict[str, Any]:
        """The parameters that say something: the method's shown_in_names, and what is set and not at its default."""
        method = registry.find(self.method)
        return {
            key: value
            for key, value in self.lasting_parameters.items()
            if value is not None and (key in method.shown_in_names or value != method.parameters[key].default)
        }

    @property
    def lasting_parameters(self) -> dict[str, Any]:
        """The parameters that the outcome depends on: all but those that say how a training is followed."""
        return {name: value for name, value in self.parameters.items() if name not in FOLLOWED}

    @property
    def own_parameters(self) -> dict[str, Any]:
        """The method's own parameters, without those that the engine has for every method."""
        return {name: self.parameters[name] for name in registry.find(self.method).declaration.parameters}

    @property
    def needs(self) -> registry.Need:
        """What the stage must see."""
        return registry.find(self.method).needs(self.parameters)


class Recipe(BaseModel):
    """Stages and options; everything a run depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stages: list[Stage]
    options: Options

    def to_yaml(self) -> str:
        """The recipe as a YAML file that rebuilds the checkpoint; a stage's seed only where it is not the run's."""
        seed = self.options.seed
        stages = [
            {stage.method: {k: v for k, v in stage.lasting_parameters.items() if (k, v) != ("seed", seed)}}
            for stage in self.stages
        ]
        options = self.options.model_dump(exclude={"out", "name", "results", "trust_remote_code"})
        return yaml.safe_dump({"stages": stages, **options}, sort_keys=False)


def _written_out(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The stages, those of a preset in its place."""
    for name, given in stages:
        method = registry.find(name)
        if method.scope == "stages":
            yield from _written_out(method.run(**method.bind(given)))
        else:
            yield name, given


def build(stages: Sequence[tuple[str, Mapping[str, Any]]], options: Mapping[str, Any]) -> Recipe:
    """A complete recipe from stages and options, as given by any of the three ways to write one."""
    if not stages:
        raise ValueError(f"the recipe names no method; methods: {', '.join(sorted(registry.METHODS))}.")
    complete = make_options(options).resolved()
    bound = []
    for name, given in _written_out(stages):
        method = registry.find(name)
        with_seed = {"seed": complete.seed, **given} if "seed" in method.parameters else given
        bound.append(Stage(method=name, parameters=method.bind(with_seed)))
    return Recipe(stages=bound, options=complete)
