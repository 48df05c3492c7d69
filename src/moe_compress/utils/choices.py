"""Words that people write: in two, the nearest known one, and values in the type of an annotation."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

# `int | None`, and `Annotated[int, ...] | None`.
UNIONS = (types.UnionType, typing.Union)


def key_value(word: str) -> tuple[str, str]:
    """A word in two. ValueError if it is no `key=value`."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r} is not key=value; stages are joined by +.")
    return key, value


def coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn a recipe's word (or a value from YAML or Python) into the type of an annotation, or say what would do."""
    readers = [each for each in getattr(hint, "__metadata__", ()) if hasattr(each, "read")]
    if typing.get_origin(hint) is Annotated and typing.get_origin(typing.get_args(hint)[0]) in UNIONS and not readers:
        return coerce(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) in UNIONS:
        inner = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        return None if value in (None, "none", "null") else coerce(inner, value, where)
    if not isinstance(value, str | int | float | os.PathLike):
        raise ValueError(f"{where}={value}: one word or number is needed.")
    text = str(value)
    if typing.get_origin(hint) is Annotated:
        return readers[0].read(text, where) if readers else coerce(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is Literal:
        return choice(typing.get_args(hint), text, where)
    if hint is bool:
        return choice(("true", "false"), text.lower(), where) == "true"
    try:
        return _number(hint, text) if hint in (int, float) else hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{where}={text}: {kind} is needed.") from error


def _number(hint: type, text: str) -> Any:
    """Python alone would also read digits of other scripts, and underscores between them."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(inf|infinity|nan)", text, re.ASCII | re.IGNORECASE):
        raise ValueError(text)
    return hint(text)


class Reader(Protocol):
    """How a word of a parameter is read, as its annotation says: Annotated[int, AtLeast(1)]."""

    def read(self, text: str, where: str) -> Any:
        """The value. Raises ValueError, with what would have worked, for any other word."""

    def shown(self) -> str:
        """What may be written, for lists of parameters."""


@dataclass(frozen=True)
class Means:
    """What a default stands for that says nothing by itself: Annotated[int, Means("0: all of them")] = 0."""

    said: str


@dataclass(frozen=True)
class Added:
    """A parameter that methods had not from the beginning: Annotated[float, Added()] = 0.0.

    What leaves it at its default is what it was before there was such a parameter, and keeps its identity.
    """


def is_added(hint: Any) -> bool:
    """Whether an annotation says so."""
    return any(isinstance(each, Added) for each in getattr(hint, "__metadata__", ()))


@dataclass(frozen=True)
class AtLeast:
    """Whole numbers from one up. sentence: what is needed, in messages."""

    least: int
    sentence: str = "a whole number from {least} up is needed."

    def read(self, text: str, where: str) -> int:
        """The number."""
        number: int = coerce(int, text, where)
        if number < self.least:
            raise ValueError(f"{where}={number}: {self.sentence.format(least=self.least)}")
        return number

    def shown(self) -> str:
        """What may be written."""
        return f"whole number from {self.least}"


@dataclass(frozen=True)
class CountOr:
    """Whole numbers from 1 up, or one of some words."""

    words: tuple[str, ...]

    def read(self, text: str, where: str) -> int | str:
        """The number, or the word."""
        if text in self.words:
            return text
        try:
            return AtLeast(1).read(text, where)
        except ValueError as error:
            words = " or ".join([", ".join(["a whole number from 1 up", *self.words[:-1]]), *self.words[-1:]])
            raise ValueError(f"{where}={text}: {words} is needed.") from error

    def shown(self) -> str:
        """What may be written."""
        return ", ".join(["whole number from 1", *self.words])


@dataclass(frozen=True)
class Numbers:
    """Whole numbers separated by commas, as text; empty for a default."""

    def read(self, text: str, where: str) -> str:
        """The text."""
        numbers(text, where)
        return text

    def shown(self) -> str:
        """What may be written."""
        return "whole numbers separated by commas"


def numbers(words: str, key: str) -> tuple[int, ...]:
    """`128,1024` as numbers. ValueError if they are none."""
    try:
        return tuple(_number(int, word.strip()) for word in words.split(",") if words)
    except ValueError as error:
        raise ValueError(f"{key}={words}: numbers separated by commas are needed, such as 128,1024.") from error


def choice(allowed: tuple[str, ...], value: str, where: str) -> str:
    """The value if it is allowed, else a ValueError that suggests the nearest one."""
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
