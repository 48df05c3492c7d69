"""What the engine of a stage does for every method, as recipes say it beside a method's own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from moe_compress.utils.choices import Added, Means
from moe_compress.utils.declarations import Declaration, Parameter, of_function


class EngineOptions:
    """Fields that are parameters of every method of a kind."""

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Self:
        """Those among a stage's parameters."""
        fields: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        return cls(**{name: parameters[name] for name in fields if name in parameters})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStageOptions(EngineOptions):
    """What the engine of weight stages does for every method, as recipes say it.

    where, spare: parts of a layer that change, and that do not; propagate: what later layers see; unseen: what becomes
    of experts with fewer than `min_tokens` tokens; shrink: tokens of the mean over all experts that are mixed into an
    expert's statistics; allocate, spread: how a budget is shared out among experts, and how far from even it may be (of
    methods with a trial); experts_at_once: whose statistics are held at the same time (0: all).
    """

    where: str = "experts"
    spare: Annotated[str, Means("empty: nothing")] = ""
    propagate: Literal["compressed", "original"] = "compressed"
    unseen: str = "pooled"
    min_tokens: int = 1
    shrink: float = 0.0
    allocate: Literal["uniform", "sensitivity", "utilisation", "both", "owl"] = "uniform"
    spread: float = 0.1
    experts_at_once: Annotated[int, Means("0: all")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions(EngineOptions):
    """How a stage that recovers what was lost trains, as recipes say it.

    teacher: the model that is imitated (zoo name, local folder or hub id), empty for the one that the recipe starts
    from; steps: of the optimiser, AdamW; batch: windows of the calibration text that a step sees; lr: the highest
    learning rate, reached after the share `warmup` of the steps, and left on a cosine; decay: of weights; clip: norm to
    which gradients are cut (0: none); recompute: make what a layer computes again on the way back, which saves memory;
    keep: steps after which a killed run goes on; holdout: share of the windows, the last ones, that it never trains on:
    the loss on them is measured before the first step, every `keep` steps and at the end, and the best state is what is
    left (0: none is held aside, and the last state is left); checkpoint_every: steps after which the student so far is
    written as a checkpoint of its own (0: never); keep_checkpoints: how many of the latest of these stay (0: all); log:
    where losses are shown besides the run's log.
    """

    teacher: Annotated[str, Means("empty: the model that the recipe starts from")] = ""
    steps: int = 200
    batch: int = 8
    lr: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.0
    clip: Annotated[float, Means("0: none")] = 1.0
    recompute: bool = False
    keep: int = 50
    holdout: Annotated[float, Added(), Means("0: none")] = 0.0
    checkpoint_every: Annotated[int, Means("0: never")] = 0
    keep_checkpoints: Annotated[int, Means("0: all")] = 0
    log: Literal["jsonl", "wandb", "tensorboard"] = "jsonl"


TEACHER = "teacher"
# How a training is followed: nothing that it leaves depends on these, and no name or identity holds them.
CHECKPOINTS = ("checkpoint_every", "keep_checkpoints")
FOLLOWED = (*CHECKPOINTS, "log")
ALLOCATION, SELECTION = ("allocate", "spread"), ("where", "spare")
WORDS_OF_ENGINE = {"spread": "allocate!=uniform", "keep_checkpoints": "checkpoint_every!=0"}
# What is said of the text that a stage sees; of nothing, where it looks at none.
WORDS_OF_TEXT = ("propagate", "unseen", "min_tokens", "shrink", "experts_at_once")


def with_engine_parameters(declaration: Declaration) -> dict[str, Parameter]:
    """A method's own parameters, and those that the engine has for every method of its kind."""
    if declaration.decorator == "weight_method":
        return _with_weight_options(declaration)
    if declaration.decorator == "recovery_method":
        return _with_training_options(declaration)
    return dict(declaration.parameters)


def _with_training_options(declaration: Declaration) -> dict[str, Parameter]:
    """A recovery method's own parameters, then how it trains, with the defaults that it sets."""
    engine = of_function(TrainingOptions, "").parameters
    if not declaration.keywords.get("trains", True):
        engine = {TEACHER: engine[TEACHER]}
    engine = {name: each for name, each in engine.items() if name not in declaration.keywords.get("lacks", ())}
    own = {name: replace(each, default=declaration.keywords.get(name, each.default)) for name, each in engine.items()}
    return {**declaration.parameters, **own}


def _with_weight_options(declaration: Declaration) -> dict[str, Parameter]:
    """A weight method's own parameters and the engine's, in the order in which names and lists show them."""
    given = declaration.keywords
    engine = of_function(WeightStageOptions, "").parameters
    unseen = given["unseen"]
    engine = {**engine, "unseen": Parameter(Literal[tuple(unseen)], unseen[0])}
    if "min_tokens" in given:
        engine["min_tokens"] = replace(engine["min_tokens"], default=given["min_tokens"])
    if not given.get("allocates"):
        engine = {name: parameter for name, parameter in engine.items() if name not in ALLOCATION}
    found: dict[str, Parameter] = {}
    if given["selection_after"] not in declaration.parameters:
        raise ValueError(f"selection_after={given['selection_after']!r} is no parameter of {declaration.name}.")
    for name, parameter in declaration.parameters.items():
        found[name] = parameter
        if name == given["selection_after"]:
            found |= {each: engine[each] for each in SELECTION}
    return found | {name: parameter for name, parameter in engine.items() if name not in SELECTION}
