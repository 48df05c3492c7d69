"""When a parameter means something: rules over the values of others, as declarations write them.

    {"bases": "structure=basis_mixture,auto", "sparse": "structure=sparse_low_rank and pattern=none"}

`a=b,c`: a is one of these; `a!=b`: it is none of these; `and` binds closer than `or`. A rule for `clip=signed` is one
for this value alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def holds(rule: str, values: Mapping[str, Any]) -> bool:
    """Whether the values are as the rule says."""
    return any(all(_is_so(*term, values) for term in terms) for terms in _alternatives(rule))


def described(rule: str) -> str:
    """The rule in words: what has to be said."""
    return ", or ".join(" and ".join(_term(*term) for term in terms) for terms in _alternatives(rule))


def parameters_of(rule: str) -> set[str]:
    """The parameters that a rule asks."""
    return {name for terms in _alternatives(rule) for name, _, _ in terms}


def meaningless(rules: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(parameter, its rule) of those whose rule does not hold, or does not for the value that they have."""
    for key, rule in rules.items():
        name, _, value = key.partition("=")
        if (not value or word(values[name]) == value) and not holds(rule, values):
            yield name, rule


def _alternatives(rule: str) -> list[list[tuple[str, bool, list[str]]]]:
    """Terms (parameter, whether it is one of these, values), all of which hold in one of the alternatives."""
    return [[_parsed(term) for term in each.split(" and ")] for each in rule.split(" or ")]


def _parsed(term: str) -> tuple[str, bool, list[str]]:
    name, _, values = term.partition("=")
    return name.removesuffix("!"), not name.endswith("!"), values.split(",")


def _is_so(name: str, among: bool, wanted: list[str], values: Mapping[str, Any]) -> bool:
    return (word(values[name]) in wanted) == among


def _term(name: str, among: bool, wanted: list[str]) -> str:
    if wanted == ["none"]:
        return f"no {name}=" if among else f"{name}="
    return f"{name}={' or '.join(wanted)}" if among else f"another {name}= than {' or '.join(wanted)}"


def word(value: Any) -> str:
    """A value as a recipe writes it, and rules do."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
