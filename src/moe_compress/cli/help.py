"""What `--help` says of a command: what it does, an example, and its words with types and defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

from moe_compress.evaluation.harnesses import HARNESSES
from moe_compress.run.option_uses import USED
from moe_compress.run.options import option_parameters
from moe_compress.utils.declarations import REQUIRED, Parameter, function_of

API = "moe_compress.api"
LITERAL = "\b\n"  # a paragraph that click leaves as it is
WIDTH = 78
RECIPE = (
    "A recipe is a method and its parameters (`list METHOD` shows them), stages joined by +, or a .yaml file; words "
    "behind it set options of the run, or override parameters (expert_drop.keep=5, or 2.keep=5 by the stage's number)."
)
# Commands whose other words are folders of records, and their own, as the page's function has them.
TABLES = {"table": ("out",), "report": ("out", "png")}
# Commands whose first word may choose another function.
KINDS = {"export": {"gguf-plan": "export_gguf_plan", "imatrix": "export_imatrix"}}
# Commands whose function is called otherwise: `data` is a package.
FUNCTIONS = {"data": "show_data"}


class WithWords(TyperCommand):
    """A command whose help lists its words; they are looked up when somebody asks."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, with the words behind the summary."""
        self.help = "\n\n".join([self.help or "", *options_of(str(self.name))])
        super().format_help(ctx, formatter)


def options_of(command: str) -> list[str]:
    """Paragraphs: the command's own words and what they mean, and the options of a run where it takes them."""
    if command in TABLES:
        page = function_of(API, "report")
        words = _listed("Words", {key: page.parameters[key] for key in TABLES[command]})
        return [words, " ".join(page.about.split())] if command == "report" else [words]
    harness = HARNESSES.get(command)
    found = harness.declaration if harness else function_of(API, FUNCTIONS.get(command, command))
    own = {key: each for key, each in found.parameters.items() if (command, key) != ("export", "pad")}
    parts = [RECIPE] if command in ("compress", "plan") else []
    parts += [_listed("Words", own)] if own else []
    parts += [" ".join(found.about.split())] if found.about and own else []
    if found.takes_others:
        used = harness.options if harness else USED.get(FUNCTIONS.get(command, command), ())
        fields = {
            key: each
            for key, each in option_parameters().items()
            if key not in own and (key in used or not used) and (key != "model" or not harness)
        }
        parts.append(_listed("Options of the run (docs/recipes.md says what they mean)", fields))
    for kind, function in KINDS.get(command, {}).items():
        other = function_of(API, function)
        behind = ", and options of a run (docs/recipes.md)" if other.takes_others else ""
        parts.append(_listed(f"Words of {command} {kind}{behind}", other.parameters))
    return parts


def _listed(title: str, parameters: Mapping[str, Parameter]) -> str:
    """A line a word: name and default, and what may be written."""
    from moe_compress.cli.catalogue import choices, word

    lines = []
    for key, each in parameters.items():
        said = f"{key}={'' if each.default is REQUIRED else word(each.default)}"
        line = f"  {said:<24} {choices(each.hint)}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 27, break_long_words=False)
    return LITERAL + "\n".join([f"{title}:", *lines])
