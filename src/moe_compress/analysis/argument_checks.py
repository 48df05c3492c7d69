"""What a caller hands over, checked against the annotations: a wrong type is one sentence instead of a late crash."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

P = ParamSpec("P")
R = TypeVar("R")
STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing arguments (ValueError) whose types are not those that its signature names."""
    strictly = validate_call(config=STRICT)(function)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        signature.bind(*args, **keywords)  # too few or too many are Python's own error
        try:
            return strictly(*args, **keywords)
        except ValidationError as error:
            name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
            raise ValueError(f"{name}: {_said(error, list(signature.parameters))}") from error

    return call


def validated(kind: type[R], values: Mapping[str, Any]) -> R:
    """A dataclass made of plain values; ValueError names the first that is not of its field's type."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"this is no {kind.__name__}: {_said(error)}") from error


def _said(error: ValidationError, names: list[str] | None = None) -> str:
    """The first mistake in a sentence; arguments by position are called by their `names`."""
    found = error.errors()[0]
    first, *inner = [part for part in found["loc"] if "[" not in str(part)] or ["value"]
    where = names[first] if names and isinstance(first, int) else first
    place = "".join(f"[{part!r}]" for part in inner)
    return f"{where}{place}={found['input']!r:.60}: {found['msg'][0].lower()}{found['msg'][1:]}."
