"""The commands: compress, apply, evaluate, plan, export, table, list, zoo and more.

Words are `key=value`; see `recipes/parser.py`. Whatever a user can get wrong ends in one sentence and exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.cli.arguments import normalised

INTERRUPTED, TERMINATED, UNASKED = 130, 143, 3
app = typer.Typer(
    help="Compress Mixture-of-Experts language models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
PAGE = "All options and parameters: docs/recipes.md, and the command `list METHOD`."
MEASURING = "What is measured, and how: docs/measuring.md; options of a run: docs/recipes.md."


def _words(help: str, page: str = PAGE) -> Any:
    """Any number of words."""
    return typer.Argument(help=f"{help} {page}", metavar="WORDS")


SPEED = (
    "a model, then original=, prompts=, batches=, tokens=, runs=, seconds=, starts=, quick=, dtype=, device=, threads= "
    "and results= as key=value words."
)
TASKS = "a model, then original=, tasks=, limit=, fewshot=, batch= and options of the run as key=value words."
RECIPE = (
    "a recipe, which is a method and its parameters (key=value), stages joined by +, or a .yaml file; then key=value "
    "words that set options of the run (model=, data=, samples=, out=, ...) or override parameters."
)


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more")] = False) -> None:
    from moe_compress.cli.terminal import set_up_logging

    set_up_logging(verbose)


@app.command()
def compress(words: Annotated[list[str], _words(RECIPE)]) -> None:
    """Run a recipe, for example: compress "expert_drop score=reap ratio=0.25" model=tiny-mixtral."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_result
    from moe_compress.recipes.parser import split_words

    sentence, overrides = split_words(words)
    show_result(api.compress(sentence, *overrides))


@app.command()
def apply(words: Annotated[list[str], _words("a plan.json, then options of the run as key=value words.")]) -> None:
    """Apply a saved plan without calibration: apply plan.json [model=...] [any_model=true] [out=...]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_result

    show_result(api.apply(words[0], **_pairs(words[1:])))


@app.command()
def evaluate(words: Annotated[list[str], _words("a model, then options of the run as key=value words.")]) -> None:
    """Measure a checkpoint against its original: evaluate FOLDER [original=...] [eval_data=...]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_result

    show_result(api.evaluate(words[0], **_pairs(words[1:])))


@app.command()
def plan(words: Annotated[list[str], _words(RECIPE)]) -> None:
    """Validate a recipe and forecast sizes, FLOPs and memory from config.json alone."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown
    from moe_compress.compression.forecast import as_markdown
    from moe_compress.recipes.parser import split_words

    sentence, overrides = split_words(words)
    show_markdown(as_markdown(api.plan(sentence, *overrides)))


@app.command()
def flops(
    words: Annotated[list[str], _words("a model, then tokens=, context=, batch=, results=.", MEASURING)],
    check: Annotated[bool, typer.Option("--check", help="count with torch's counter too; 1 if they differ")] = False,
) -> None:
    """Count FLOPs and sizes by component: flops MODEL [tokens=2048] [context=2048] [batch=1] [--check]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    options: dict[str, Any] = {"check": check, **_pairs(words[1:])}
    found = api.flops(words[0], **options)
    show_markdown(found.markdown())
    if found.agrees is False:
        sys.exit(1)


@app.command()
def export(
    words: Annotated[list[str], typer.Argument(help="an edited checkpoint, then out=DIR", metavar="WORDS")],
    pad: Annotated[bool, typer.Option("--pad", help="fill layers with fewer experts up with dead ones")] = False,
) -> None:
    """Make an uneven model plain, where that is exact: export FOLDER --pad [out=DIR]."""
    from moe_compress import api

    options = _only(_pairs(words[1:]), ("out",), "export")
    typer.echo(f"checkpoint: {api.export(words[0], pad=pad, **options)}")


@app.command()
def analyze(words: Annotated[list[str], _words("a model, then options of the run as key=value words.")]) -> None:
    """Say what each layer's experts do and which could go: analyze MODEL [layers=3,7] [prompts=FILE] [out=DIR]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    options: dict[str, Any] = dict(_pairs(words[1:]))
    found = api.analyze(words[0], **options)
    show_markdown(found.markdown())
    typer.echo(f"written: {', '.join(map(str, found.files))}", err=True)


@app.command()
def compare(words: Annotated[list[str], _words("two models, then options of the run as key=value words.")]) -> None:
    """Two models side by side, generations and predictions: compare A B [prompts=FILE] [max_tokens=30]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    if len(words) < 2 or "=" in words[1]:
        raise ValueError("compare takes two models: compare A B.")
    options: dict[str, Any] = dict(_pairs(words[2:]))
    show_markdown(api.compare(words[0], words[1], **options).markdown())


@app.command()
def routing(words: Annotated[list[str], _words("a model, then options of the run as key=value words.")]) -> None:
    """Say how far a checkpoint routes otherwise than its original, layer by layer: routing FOLDER [original=...]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    show_markdown(api.routing(words[0], **_pairs(words[1:])).markdown())


@app.command()
def speed(words: Annotated[list[str], _words(SPEED, MEASURING)]) -> None:
    """Time a checkpoint beside its original: speed FOLDER [original=] [prompts=128,1024] [batches=1,8] [quick=true]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    show_markdown(api.speed(words[0], **_pairs(words[1:])).markdown())


@app.command()
def tasks(words: Annotated[list[str], _words(TASKS, MEASURING)]) -> None:
    """Accuracy on tasks beside the original's: tasks FOLDER [tasks=local|paper|NAMES|FILE] [limit=] [fewshot=]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    options: dict[str, Any] = dict(_pairs(words[1:]))
    show_markdown(api.tasks(words[0], **options).markdown())


@app.command()
def verify(words: Annotated[list[str], typer.Argument(help="a checkpoint", metavar="FOLDER")]) -> None:
    """Load a checkpoint in a fresh process by stock transformers, compare, and say which programs can load it."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    found = api.verify(words[0], **_only(_pairs(words[1:]), ("results",), "verify"))
    show_markdown(found.markdown())
    if not found.passed:
        sys.exit(1 if found.problems else UNASKED)


@app.command()
def push(
    words: Annotated[list[str], typer.Argument(help="a checkpoint, then user/name on the hub", metavar="FOLDER REPO")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be sent; needs no network")] = False,
) -> None:
    """Upload a checkpoint to the hub: push FOLDER USER/NAME [--dry-run] [private=true] [message=] [revision=]."""
    from moe_compress import api
    from moe_compress.cli.terminal import show_markdown

    if len(words) < 2 or "=" in words[1]:
        raise ValueError("push takes a folder and a name on the hub: push FOLDER USER/NAME.")
    known = ("private", "message", "revision", "dry_run")
    options: dict[str, Any] = {"dry_run": dry_run, **_only(_pairs(words[2:]), known, "push")}
    show_markdown(api.push(words[0], words[1], **options).markdown())


Records = Annotated[
    list[str] | None,
    typer.Argument(help="records, or folders of them (runs/records), and out=DIR (runs)", metavar="WORDS"),
]


@app.command()
def table(words: Records = None) -> None:
    """Make tables from records (Markdown, CSV, LaTeX, JSON), one per protocol and model: table [RECORDS] [out=DIR]."""
    from moe_compress.cli.terminal import show_tables
    from moe_compress.reports.table import read_tables, write_tables
    from moe_compress.utils.files import require_writable

    places, out = _places(words)
    require_writable(out, f"out={out}")
    tables, skipped = read_tables(places)
    written = write_tables(tables, out)
    show_tables(tables)
    typer.echo(f"written: {', '.join(map(str, written))}", err=True)
    for sentence in skipped:
        typer.echo(f"warning: skipped: {sentence}.", err=True)
    if skipped:
        raise typer.Exit(1)


@app.command()
def report(words: Records = None) -> None:
    """Make one HTML page of records: tables, fronts, pictures; and the plots as files: report [RECORDS] [out=DIR]."""
    from moe_compress.reports.html_report import make_report

    made = make_report(*_places(words))
    typer.echo(f"written: {', '.join(map(str, made.files))}", err=True)
    if made.skipped:
        raise typer.Exit(1)


def _places(words: list[str] | None) -> tuple[list[str], Path]:
    """Records, and the folder to write to."""
    places = [word for word in words or () if "=" not in word]
    options = _only(_pairs([word for word in words or () if "=" in word]), ("out",), "this command")
    return places or ["runs/records"], Path(options.get("out", "runs"))


@app.command("list")
def list_(
    method: Annotated[str, typer.Argument(help="that one only, and what its parameters mean", metavar="METHOD")] = "",
) -> None:
    """List methods with their parameters, and the families with entries of their own; or one METHOD."""
    from moe_compress.cli.catalogue import method_markdown, methods_markdown
    from moe_compress.cli.terminal import show_markdown

    show_markdown(method_markdown(method) if method else methods_markdown())


@app.command()
def zoo() -> None:
    """List the shipped models and the model shapes that planning knows offline."""
    from moe_compress.cli.catalogue import zoo_markdown
    from moe_compress.cli.terminal import show_markdown

    show_markdown(zoo_markdown())


def _pairs(words: list[str]) -> dict[str, str]:
    from moe_compress.cli.arguments import option_pairs

    return option_pairs(words)


def _only(options: dict[str, str], known: tuple[str, ...], command: str) -> dict[str, str]:
    """The options, if the command has them all."""
    for key in options:
        if key not in known:
            raise ValueError(f"{command} has no option {key!r}; it takes: {', '.join(known)}.")
    return options


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what was begun is ended as well
    try:
        app(args=normalised(sys.argv[1:]))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("MOE_COMPRESS_DEBUG") or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        hint = " Use fewer or shorter windows, or device=cpu." if _out_of_memory(error) else ""
        typer.echo(f"error: {' '.join(str(error).split())}{hint}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("interrupted: the same command goes on from whatever was kept.", err=True)
        raise


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError")
