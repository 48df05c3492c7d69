"""Fills the generated blocks of the pages under docs/ from signatures: what a recipe, a command or a run may be told.

    python scripts/docs/pages.py [--check]

A block stands between `<!-- generated: KIND NAME -->` and `<!-- end generated -->`. `parameters METHOD`: a method's
parameters and presets; `scores`: the scores of expert_drop; `words COMMAND`: the own words of a harness or of another
command; `options`: the options of a run; `formats`: the storage formats of weights. --check writes nothing, names stale
pages, and ends in exit code 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_compress.cli.catalogue import choices, goes_with, recipe_words, word
from moe_compress.cli.help import FUNCTIONS
from moe_compress.evaluation.harnesses import HARNESSES
from moe_compress.methods import registry, score_registry
from moe_compress.run.options import option_parameters
from moe_compress.utils.declarations import REQUIRED, Declaration, Parameter, declarations, function_of
from moe_compress.utils.files import atomic_write

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(<!-- generated: (\w+) ?(\w*) -->\n).*?(<!-- end generated -->)", re.DOTALL)
# Words of the Python functions that mean nothing on the command line.
UNSAID = {"export": ("pad",)}


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    heads = list(titles)
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def rows_of(parameters: Mapping[str, Parameter]) -> list[list[str]]:
    """Of each parameter: its name, its default, and what may be written."""
    return [
        [f"`{name}`", "needed" if each.default is REQUIRED else f"`{word(each.default)}`", choices(each.hint)]
        for name, each in parameters.items()
    ]


def parameters(name: str) -> str:
    """A method's parameters, presets and paper."""
    method = registry.find(name)
    found = [table(("parameter", "default", "values"), rows_of(method.parameters))]
    found += [f"At most one of {', '.join(f'`{key}`' for key in group)} is given." for group in method.exclusive]
    found += ["".join(f"- {sentence}\n" for sentence in goes_with(method)).rstrip()] * bool(method.goes_with)
    if method.presets:
        presets = ([f"`preset={preset}`", f"`{recipe_words(given)}`"] for preset, given in method.presets.items())
        found += [table(("preset", "sets"), presets)]
    return "\n\n".join([*found, f"Paper: {method.paper}."])


def scores(_name: str) -> str:
    """Every score of expert_drop."""
    by_name = {str(each.positional[0]): each for each in declarations(score_registry.PACKAGE, "score")}
    return table(
        ("score", "idea", "needs", "paper"),
        ([f"`{name}`", _sentence(by_name[name]), *_said(by_name[name])] for name in score_registry.NAMES.names()),
    )


def _sentence(declaration: Declaration) -> str:
    """The first line of what a score says of itself, without the paper, which has a column of its own."""
    return re.sub(r" \([^()]*\d{4}[^()]*\)\.?$", ".", declaration.summary).removesuffix(".")


def _said(declaration: Declaration) -> list[str]:
    return [f"`{declaration.keywords['needs']}`", declaration.keywords.get("paper", "")]


def words(command: str) -> str:
    """The own words of a command."""
    harness = HARNESSES.get(command)
    found = harness.declaration if harness else function_of("moe_compress.api", FUNCTIONS.get(command, command))
    own = {name: each for name, each in found.parameters.items() if name not in UNSAID.get(command, ())}
    return table(("word", "default", "values"), rows_of(own))


def options(_name: str) -> str:
    """The options of a run."""
    return table(("option", "default", "values"), rows_of(option_parameters()))


def formats(_name: str) -> str:
    """What every storage format is, whether it is read and written, and who loads what is written of experts."""
    # Only here: what a config says is asked of the formats themselves, which need torch.
    from moe_compress.checkpoints.formats import registry as stored

    titles = ("format", "what it is", "read", "written", "stock transformers", "vLLM", "llama.cpp")
    said = {str(each.positional[0]): each for each in declarations(stored.PACKAGE, "storage_format")}
    return table(titles, ([f"`{n}`", said[n].summary.rstrip("."), *_format_cells(n, said[n])] for n in sorted(said)))


def _format_cells(name: str, declaration: Declaration) -> list[str]:
    """The rest of the row."""
    from moe_compress.checkpoints.formats import registry as stored

    format = stored.formats()[name]
    config = _config_of_experts(format, int(declaration.keywords.get("implies", {}).get("bits", 4)))
    reader = stored.format_in({stored.QUANTIZATION: config}) if config else format
    asked = (ask(config) for ask in (reader.loaders.transformers, reader.loaders.vllm, reader.loaders.llama_cpp))
    read = "yes" if format.layouts or name in (stored.DENSE, stored.EDITED_PACKED) else f"as `{reader.name}`"
    cells = ["yes: " + why if yes else "no: " + why for yes, why in asked]
    if name == stored.EDITED_PACKED:
        cells = ["yes: with trust_remote_code=True, or behind `import moe_compress`", *(2 * ["no: its layers differ"])]
    return [read, "yes" if format.writer is not None else "no", *cells]


def _config_of_experts(format: Any, bits: int) -> dict[str, Any]:
    """What config.json says where experts are packed in it; nothing for a format that no config names."""
    from moe_compress.checkpoints.formats.registry import Packing
    from moe_compress.models.matrices import Matrix

    if format.writer is None or format.writer.config is None:
        return {}
    experts = Matrix("mlp.experts.up", "experts", "routed", torch.empty(0, device="meta"))
    sizes, whole = {(0, experts.name): 128}, format.writer.inputs == 0
    config: dict[str, Any] = format.writer.config(
        Packing(bits=bits, whole_rows=whole, matrices={0: [experts]}, group_sizes=sizes)
    )
    return config


KINDS: dict[str, Callable[[str], str]] = {
    "parameters": parameters,
    "scores": scores,
    "words": words,
    "options": options,
    "formats": formats,
}


def filled(text: str) -> str:
    """A page with its generated blocks as they should be. ValueError for a block of no known kind."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in KINDS:
            raise ValueError(f"<!-- generated: {found[2]} -->: kinds are {', '.join(KINDS)}.")
        return f"{found[1]}\n{KINDS[found[2]](found[3])}\n\n{found[4]}"

    return BLOCK.sub(block, text)


def stale(folder: Path) -> dict[Path, str]:
    """Pages whose blocks are not current, and what they should be."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md"))}
    return {path: new for path, text in pages.items() if (new := filled(text)) != text}


def main(arguments: list[str]) -> int:
    """Write the pages, or only say which are stale."""
    pages = stale(DOCS)
    for path, text in pages.items():
        print(path.relative_to(DOCS.parent))
        if "--check" not in arguments:
            atomic_write(path, text.encode())
    return int("--check" in arguments and bool(pages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
