"""Words that people write: the nearest known one, and values in the type of an annotation."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal


def coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn a recipe's word (or a value from YAML or Python) into the type of an annotation, or say what would do."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        return None if value in (None, "none", "null") else coerce(inner, value, where)
    if not isinstance(value, str | int | float | os.PathLike):
        raise ValueError(f"{where}={value}: one word or number is needed.")
    text = str(value)
    if typing.get_origin(hint) is Literal:
        return _choice(typing.get_args(hint), text, where)
    if hint is bool:
        return _choice(("true", "false"), text.lower(), where) == "true"
    try:
        return hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{where}={text}: {kind} is needed.") from error


def _choice(allowed: tuple[str, ...], value: str, where: str) -> str:
    if value in allowed:
        return value
    raise ValueError(f"{where}={value}: {did_you_mean(value, allowed)}allowed: {', '.join(allowed)}.")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one, if any is (`cutoff`: of difflib's ratio)."""
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that suggests the nearest known word, followed by a blank; empty where none is near."""
    near = nearest(word, known)
    return f"did you mean {near!r}? " if near else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is none of those known."""
    return f"unknown key {key!r}: {did_you_mean(key, known)}known: {', '.join(known)}."


def one_of(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is known, else a ValueError that suggests the nearest one."""
    names = sorted(known)
    if name in names:
        return name
    raise ValueError(f"unknown {what} {name!r}: {did_you_mean(name, names)}known: {', '.join(names)}.")
