"""One table of methods. A method's recipe parameters are its keyword-only arguments.

    @method("model", group="trimming", paper="...", needs="text")
    def expert_drop(layers, *, score: Score = "reap", keep: int | None = None) -> list[Edit]: ...

makes `expert_drop score=reap keep=6` a valid recipe: types, defaults and allowed values are read from the
signature, so there is nothing to keep in step. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scope = Literal["weight", "layer", "model", "recover"]
Need = Literal["text", "weights", "nothing"]


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
    needs: Callable[[Mapping[str, Any]], Need]
    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rivals: tuple[tuple[str, ...], ...] = ()
    headline: tuple[str, ...] = ()

    def bind(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Typed and complete parameters: unknown names and bad values are errors, defaults are filled in."""
        given = dict(given)
        preset = given.pop("preset", None)
        bound = {name: parameter.default for name, parameter in self.parameters.items()}
        bound |= self._preset(preset)
        bound |= dict.fromkeys(self._outdone(given))
        for name, text in given.items():
            if name not in self.parameters:
                raise ValueError(self._unknown(name))
            bound[name] = coerce(self.hints[name], text, f"{self.name}.{name}")
        for name, value in bound.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"{self.name} needs {name}=.")
        return bound

    def _outdone(self, given: Mapping[str, Any]) -> list[str]:
        """Parameters that give way to a rival which the recipe names (`keep` instead of `ratio`)."""
        outdone: list[str] = []
        for group in self.rivals:
            named = [name for name in group if given.get(name) is not None]
            if len(named) > 1:
                raise ValueError(f"{self.name} takes {'= or '.join(group)}=, not both.")
            outdone += [name for name in group if named and name not in named]
        return outdone

    def rivals_of(self, name: str) -> set[str]:
        """Parameters that cannot be set together with `name`."""
        return {other for group in self.rivals if name in group for other in group} - {name}

    def _preset(self, name: str | None) -> Mapping[str, Any]:
        if name is None:
            return {}
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise ValueError(f"{self.name} has no preset {name!r}; presets: {known}.")
        return self.presets[name]

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.parameters, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{self.name} has no parameter {name!r}.{hint} It takes: {', '.join(self.parameters)}."


METHODS: dict[str, Method] = {}


def method(
    scope: Scope,
    *,
    group: str,
    paper: str,
    needs: Callable[[Mapping[str, Any]], Need] | Need = "nothing",
    check: Callable[..., Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    rivals: tuple[tuple[str, ...], ...] = (),
    headline: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under its own name.

    scope: what it is handed, see docs/design.md; needs: calibration text, the weights, or nothing (may
    depend on its parameters); check: same parameters, run on shapes alone before any weight is read; presets: named
    sets of parameters (`preset=paper`); rivals: groups of parameters of which a recipe sets at most one;
    headline: parameters that names and tables always show.
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
            needs=needs if callable(needs) else lambda _: needs,
            parameters={k: p for k, p in signature.items() if p.kind is p.KEYWORD_ONLY},
            hints=typing.get_type_hints(run),
            presets=presets or {},
            rivals=rivals,
            headline=headline,
        )
        return run

    return register


def find(name: str) -> Method:
    """The method of that name, or an error with the nearest known one."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown method {name!r}: {hint}known: {', '.join(sorted(METHODS))}.")


def coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn recipe text into the type of an annotation, or say what would have worked."""
    if not isinstance(value, str):
        return value
    if typing.get_origin(hint) is Literal:
        return _choice(typing.get_args(hint), value, where)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return None if value in ("none", "null") else coerce(inner[0], value, where)
    if hint is bool:
        return _choice(("true", "false"), value.lower(), where) == "true"
    try:
        return hint(value)
    except (TypeError, ValueError) as error:
        kind = {int: "a whole number", float: "a number"}.get(hint, f"a {hint.__name__}")
        raise ValueError(f"{where}={value}: {kind} is needed.") from error


def _choice(allowed: tuple[str, ...], value: str, where: str) -> str:
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{where}={value}: {hint}allowed: {', '.join(allowed)}.")
