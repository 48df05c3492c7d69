"""The templates of the page and of fronts, each compiled once; what they are given is escaped."""

from __future__ import annotations

import functools

import jinja2


def template(name: str) -> jinja2.Template:
    """A template of this folder, which may import others."""
    return _environment().get_template(name)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(str(__package__), ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
