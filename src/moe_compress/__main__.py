"""The command line: compress, apply, evaluate, plan, export, table, list, zoo and more.

Words are `key=value`; see `moe_compress/recipe.py`. Whatever a user can get wrong ends in one sentence and exit code 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = 130
app = typer.Typer(
    help="Compress Mixture-of-Experts language models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Words = Annotated[list[str], typer.Argument(help="recipe and key=value words", metavar="WORDS")]
Models = Annotated[list[str], typer.Argument(help="model (compare: two of them) and key=value words", metavar="WORDS")]


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more")] = False) -> None:
    from moe_compress.terminal import set_up_logging

    set_up_logging(verbose)


@app.command()
def compress(words: Words) -> None:
    """Run a recipe, for example: compress "expert_drop score=reap ratio=0.25" model=tiny-mixtral."""
    from moe_compress import api, recipe

    sentence, overrides = recipe.split_words(words)
    _show(api.compress(sentence, *overrides))


@app.command()
def apply(words: Words) -> None:
    """Apply a saved plan without calibration: apply plan.json [model=...] [out=...]."""
    from moe_compress import api

    _show(api.apply(words[0], **_pairs(words[1:])))


@app.command()
def evaluate(words: Words) -> None:
    """Measure a checkpoint against its original: evaluate FOLDER [original=...] [eval_data=...]."""
    from moe_compress import api

    _show(api.evaluate(words[0], **_pairs(words[1:])))


@app.command()
def plan(words: Words) -> None:
    """Validate a recipe and forecast sizes, FLOPs and memory from config.json alone."""
    from moe_compress import api, recipe
    from moe_compress.forecast import as_markdown
    from moe_compress.terminal import show_markdown

    sentence, overrides = recipe.split_words(words)
    show_markdown(as_markdown(api.plan(sentence, *overrides)))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="an edited checkpoint")],
    pad: Annotated[bool, typer.Option("--pad", help="fill layers with fewer experts up with dead ones")] = False,
    out: Annotated[str, typer.Option(help="folder of the plain checkpoint")] = "",
) -> None:
    """Make an uneven model plain, where that is exact: export FOLDER --pad --out DIR."""
    from moe_compress import api

    typer.echo(f"checkpoint: {api.export(checkpoint, out, pad)}")


@app.command()
def analyze(words: Models) -> None:
    """Say what each layer's experts do and which could go: analyze MODEL [layers=3,7] [prompts=FILE] [out=DIR]."""
    from moe_compress import api
    from moe_compress.terminal import show_markdown

    options: dict[str, Any] = dict(_pairs(words[1:]))
    found = api.analyze(words[0], **options)
    show_markdown(found.markdown())
    typer.echo(f"written: {', '.join(map(str, found.files))}", err=True)


@app.command()
def compare(
    words: Models,
    prompts: Annotated[str, typer.Option(help="a .txt or .jsonl file of prompts, or `default`")] = "default",
) -> None:
    """Two models side by side, generations and predictions: compare A B --prompts FILE [max_tokens=30]."""
    from moe_compress import api
    from moe_compress.terminal import show_markdown

    if len(words) < 2:
        raise ValueError("compare takes two models: compare A B.")
    options: dict[str, Any] = {"prompts": prompts, **_pairs(words[2:])}
    show_markdown(api.compare(words[0], words[1], **options).markdown())


@app.command()
def table(
    records: Annotated[list[str] | None, typer.Argument(help="records, or folders of them")] = None,
    out: Annotated[str, typer.Option(help="folder for tables.md and CSV files")] = "results",
) -> None:
    """Make Markdown and CSV tables from records, one per protocol and model."""
    from moe_compress import api
    from moe_compress.report.table import write_tables
    from moe_compress.terminal import show_tables

    tables = api.table(records or ["results/records"])
    written = write_tables(tables, Path(out))
    show_tables(tables)
    typer.echo(f"written: {', '.join(map(str, written))}", err=True)


@app.command("list")
def list_() -> None:
    """List methods with their parameters, and the families with entries of their own."""
    from moe_compress.catalogue import methods_markdown
    from moe_compress.terminal import show_markdown

    show_markdown(methods_markdown())


@app.command()
def zoo() -> None:
    """List the shipped models and the model shapes that planning knows offline."""
    from moe_compress.catalogue import zoo_markdown
    from moe_compress.terminal import show_markdown

    show_markdown(zoo_markdown())


def _pairs(words: list[str]) -> dict[str, str]:
    from moe_compress.recipe import option_pairs

    return option_pairs(words)


def _show(result: object) -> None:
    from moe_compress.api import Result
    from moe_compress.report.table import make_tables
    from moe_compress.terminal import show_tables

    assert isinstance(result, Result)
    rows = [record for record in (result.original, result.record) if record is not None]
    unique = list({record.name: record for record in rows}.values())
    if unique:
        show_tables(make_tables(unique))
    typer.echo(f"checkpoint: {result.folder}")


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    try:
        app(args=words_of(sys.argv[1:]))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("MOE_COMPRESS_DEBUG") or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        hint = " Use fewer or shorter windows, or device=cpu." if _out_of_memory(error) else ""
        typer.echo(f"error: {' '.join(str(error).split())}{hint}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("interrupted: run the same command again to go on where it stopped.", err=True)
        raise


def words_of(arguments: list[str]) -> list[str]:
    """`--out DIR` and `--out=DIR` are as good as `out=DIR`, for every option of a run."""
    from moe_compress.recipe import Options

    if arguments[:1] in (["table"], ["export"]):
        return arguments
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key not in Options.model_fields:
            words.append(argument)
        else:
            words.append(f"{key}={value if equals else next(rest, '')}")
    return words


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError")


if __name__ == "__main__":
    main()
