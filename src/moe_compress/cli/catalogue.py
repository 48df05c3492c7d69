"""What there is to choose from, as Markdown: methods and their parameters, families, shipped models."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_compress import zoo
from moe_compress.methods import registry
from moe_compress.methods.conditions import described
from moe_compress.models.families import ALIASES, FAMILIES, REFUSED
from moe_compress.utils.choices import Means
from moe_compress.utils.files import gigabytes

PAGE = "docs/recipes.md"


def methods_markdown() -> str:
    """Every method: what it does, its parameters with types and defaults, its presets, its paper."""
    return "\n\n".join(map(_method, sorted(registry.METHODS))) + "\n\n" + _families()


def method_markdown(name: str) -> str:
    """One method: the same, a parameter or preset a line, and what each parameter means."""
    method = registry.find(name)
    about = method.declaration.about
    lines = [_method(name), *(["", about] if about else [])]
    for group in method.exclusive:
        lines += ["", f"At most one of {', '.join(f'`{key}=`' for key in group)} is given."]
    lines += [line for sentence in goes_with(method) for line in ("", sentence)]
    return "\n".join([*lines, "", f"Options of every run, and how recipes are written: {PAGE}."])


def _method(name: str) -> str:
    method = registry.METHODS[name]
    lines = [f"### {name} ({method.group})", "", f"{method.summary} Paper: {method.paper}.", ""]
    for key, parameter in method.parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        default = "" if needed else word(parameter.default)
        lines.append(f"- `{key}={default}`: {choices(parameter.hint)}{', has to be given' * needed}")
    lines += [f"- `preset={preset}`: {recipe_words(values)}" for preset, values in method.presets.items()]
    return "\n".join(lines).rstrip()


def goes_with(method: registry.Method) -> list[str]:
    """Beside what else the parameters are said that mean nothing alone."""
    by_rule: dict[str, list[str]] = {}
    for key, rule in method.goes_with.items():
        by_rule.setdefault(rule, []).append(f"`{key}`")
    return [f"Only with {described(rule)}: {', '.join(keys)}." for rule, keys in by_rule.items()]


def choices(hint: Any) -> str:
    """What a recipe may write for an annotation."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arms = ("none" if arm is type(None) else choices(arm) for arm in typing.get_args(hint))
        return " or ".join(dict.fromkeys(arms))
    if typing.get_origin(hint) is typing.Annotated:
        inner, *more = typing.get_args(hint)
        shown = next((str(each.shown()) for each in more if hasattr(each, "shown")), "")
        said = [each.said for each in more if isinstance(each, Means)]
        kind = shown or choices(inner)
        return "; ".join([kind.removesuffix(" or none") if said and said[0].startswith("none:") else kind, *said])
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(typing.get_args(hint))
    return {bool: "true, false", int: "whole number", float: "number"}.get(hint, "text")


def word(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or value == "":
        return '""' if value == "" else "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipe_words(values: Mapping[str, Any]) -> str:
    """Parameters as a recipe writes them."""
    return " ".join(f"{key}={word(value)}" for key, value in values.items())


def _families() -> str:
    lines = [
        "### Families",
        "",
        "Any Mixture-of-Experts causal language model of transformers that keeps its experts fused",
    ]
    lines[-1] += " and its router beside them. With entries of their own:"
    lines += ["", f"- {', '.join(sorted(FAMILIES))}"]
    lines += [f"- {name}: read as {target}" for name, target in ALIASES.items()]
    lines += [f"- {f.model_type}: experts stay, {f.no_expert_edits}" for f in FAMILIES.values() if f.no_expert_edits]
    lines += [f"- {name}: refused, {reason}" for name, reason in REFUSED.items()]
    return "\n".join(lines)


def zoo_markdown() -> str:
    """The shipped models with their sizes, and the hub ids whose shapes are known offline."""
    lines = ["### Shipped models", ""]
    for name in zoo.NAMES:
        count, layers = zoo.size(name)
        lines.append(f"- `{name}`: {gigabytes(count)}, {layers} layers, {zoo.path(name)}")
    lines += ["", "### Shapes known offline (for `plan`)", ""]
    lines += [f"- `{hub_id}`" for hub_id in zoo.known_configs()]
    return "\n".join(lines)
