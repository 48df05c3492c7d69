"""One table of methods. A method's recipe parameters are its keyword-only arguments.

    @method("model", group="trimming", paper="...", needs="text")
    def expert_drop(model, *, score: Score = "reap", keep: int | None = None) -> Plan: ...

makes `expert_drop score=reap keep=6` a valid recipe: types, defaults and allowed values are read from the
signature, so there is nothing to keep in step. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_compress.utils.choices import coerce, nearest, one_of

Scope = Literal["layer", "model", "weight"]
Need = Literal[
    "text", "outputs", "noise", "weights", "input_squares", "input_grams", "channels", "gradients", "nothing"
]
# What cannot be had without running the calibration text.
FROM_TEXT: tuple[Need, ...] = ("text", "outputs", "input_squares", "input_grams", "channels", "gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A registered method: what it is called, what it is given, which parameters a recipe may set."""

    name: str
    scope: Scope
    group: str
    paper: str
    summary: str
    run: Callable[..., Any]
    check: Callable[..., Any] | None
    trial: Callable[..., Any] | None
    needs: Callable[[Mapping[str, Any]], Need]
    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exclusive: tuple[tuple[str, ...], ...] = ()
    shown_in_names: tuple[str, ...] = ()

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Typed and complete parameters: unknown names and bad values are errors, defaults are filled in."""
        typed = self._typed(given)
        bound = {name: parameter.default for name, parameter in self.parameters.items()}
        bound |= self._preset(given.get("preset"))
        for group in self.exclusive:
            named = [name for name in group if typed.get(name) is not None]
            if len(named) > 1:
                raise ValueError(f"{self.name} takes {'= or '.join(group)}=, not both.")
            bound |= dict.fromkeys(group if named else ())
        bound |= typed
        for name, value in bound.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"{self.name} needs {name}=.")
        return bound

    def displaced_by(self, given: Mapping[str, Any]) -> set[str]:
        """Parameters that give way to later words: whatever a preset sets, and the exclusive of all that is set."""
        preset = self._preset(given.get("preset"))
        named = {name for name, value in {**preset, **self._typed(given)}.items() if value is not None}
        exclusive = {other for group in self.exclusive if named & set(group) for other in group}
        return (exclusive | set(preset)) - set(given)

    def _typed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in self.parameters and name != "preset":
                raise ValueError(self.unknown(name))
        return {k: coerce(self.hints[k], v, f"{self.name}.{k}") for k, v in given.items() if k != "preset"}

    def _preset(self, name: str | None) -> Mapping[str, Any]:
        if name is None:
            return {}
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise ValueError(f"{self.name} has no preset {name!r}; presets: {known}.")
        return self.presets[name]

    def unknown(self, name: str) -> str:
        """What to say of a parameter that the method does not have."""
        near = nearest(name, self.parameters)
        hint = f" Did you mean {near!r}?" if near else ""
        return f"{self.name} has no parameter {name!r}.{hint} It takes: {', '.join(self.parameters)}."


METHODS: dict[str, Method] = {}


def method(
    scope: Scope,
    *,
    group: str,
    paper: str,
    needs: Callable[[Mapping[str, Any]], Need] | Need = "nothing",
    check: Callable[..., Any] | None = None,
    trial: Callable[..., Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    exclusive: tuple[tuple[str, ...], ...] = (),
    shown_in_names: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under its own name.

    scope: "model" is handed what was observed and returns a plan; "weight" is handed matrices that share their inputs
    and returns new ones; "layer" takes every layer through the model and back unchanged; needs: calibration text (its
    sums, or probes, or the inputs' squares or Gram matrices), the weights, or nothing (may depend on the parameters);
    check: same parameters, run on shapes alone before any weight is read; trial: same parameters, a cheap stand-in for
    the run that says what a fraction would do; presets: named sets of parameters (`preset=paper`); exclusive: groups of
    parameters of which a recipe sets at most one; shown_in_names: parameters that names and tables show.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        name = run.__name__
        if name in METHODS:
            raise ValueError(f"the method {name!r} is registered twice.")
        signature = inspect.signature(run).parameters
        METHODS[name] = Method(
            name=name,
            scope=scope,
            group=group,
            paper=paper,
            summary=(inspect.getdoc(run) or "").split("\n")[0],
            run=run,
            check=check,
            trial=trial,
            needs=needs if callable(needs) else lambda _: needs,
            parameters={k: p for k, p in signature.items() if p.kind is p.KEYWORD_ONLY},
            hints=typing.get_type_hints(run),
            presets=presets or {},
            exclusive=exclusive,
            shown_in_names=shown_in_names,
        )
        return run

    return register


def find(name: str) -> Method:
    """The method of that name, or an error with the nearest known one."""
    return METHODS[one_of(name, METHODS, "method")]
