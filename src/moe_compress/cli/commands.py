"""The commands: compress, apply, evaluate, plan, export, table, list, zoo and more, and one for each harness.

Words are `key=value`; see `recipes/parser.py`. Whatever a user can get wrong ends in one sentence and exit code 2, and
what is wrong with a word is said before torch is imported: commands import what they need when they run.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.checkpoints.model_names import require_model_name
from moe_compress.cli.arguments import normalised, only, option_pairs
from moe_compress.cli.help import FUNCTIONS, TABLES, WithWords
from moe_compress.evaluation.harnesses import HARNESSES, Harness, report_columns
from moe_compress.run.launch import ElsewhereError, launched
from moe_compress.run.option_uses import USED, require_used
from moe_compress.run.options import typed_words
from moe_compress.utils.choices import coerce
from moe_compress.utils.declarations import function_of
from moe_compress.utils.text import printable

API = "moe_compress.api"
INTERRUPTED, TERMINATED = 130, 143
# What `export` writes besides checkpoints: the function, what it takes, and how many of that are names of models.
EXPORTS = {
    "gguf-plan": ("export_gguf_plan", ("plan.json", "MODEL.gguf"), 0),
    "imatrix": ("export_imatrix", ("MODEL",), 1),
}
app = typer.Typer(
    help="Compress Mixture-of-Experts language models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Words = Annotated[list[str], typer.Argument(metavar="WORDS")]
ModelWords = Annotated[list[str], typer.Argument(metavar="MODEL [WORDS]")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.import_module("moe_compress").__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)]


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more")] = False, version: Version = False
) -> None:
    from moe_compress.cli.terminal import set_up_logging

    set_up_logging(verbose)


def _called(name: str, positional: list[str], words: list[str], models: int = 1, **flags: Any) -> Any:
    """What a function of the API returns; its words are checked before it is imported. models: among the positional."""
    given, declared = option_pairs(words), function_of(API, name)
    command = name.replace("export_", "export ").replace("_", "-").replace("show-data", "data show")
    typed_words(command, declared, given)
    require_used(command, declared.parameters, USED.get(name, ()), given)
    for model in positional[:models]:
        require_model_name(model)
    from moe_compress import api

    return getattr(api, name)(*positional, **{**flags, **given})


def _show(found: Any) -> None:
    from moe_compress.cli.terminal import show_markdown

    show_markdown(found.markdown())


@app.command(cls=WithWords)
def compress(words: Words) -> None:
    """Run a recipe and evaluate the result: compress "expert_drop score=reap ratio=0.25" model=tiny-mixtral."""
    from moe_compress.recipes.parser import parse, split_words

    sentence, overrides = split_words(words)
    recipe = parse(sentence, overrides)
    require_model_name(recipe.options.model)
    from moe_compress import api
    from moe_compress.cli.terminal import show_result

    show_result(api.run_recipe(recipe))


@app.command(cls=WithWords)
def apply(words: Words) -> None:
    """Apply a saved plan, edited by hand or not, without calibration: apply plan.json [model=...] [out=...]."""
    from moe_compress.cli.terminal import show_result

    show_result(_called("apply", words[:1], words[1:], models=0))


@app.command(cls=WithWords)
def evaluate(words: ModelWords) -> None:
    """Measure a checkpoint against its original: evaluate FOLDER [original=...] [eval_data=...]."""
    from moe_compress.cli.terminal import show_result

    show_result(_called("evaluate", words[:1], words[1:]))


@app.command(cls=WithWords)
def watch(words: Annotated[list[str], typer.Argument(metavar="RUN_FOLDER [WORDS]")]) -> None:
    """Evaluate a training's checkpoints as they appear: watch RUN_FOLDER [tasks=local] [best=kl] [device=cuda:1]."""
    found = _called("watch", words[:1], words[1:], models=0)
    _show(found)
    if found.exit_code:
        sys.exit(found.exit_code)


@app.command(cls=WithWords)
def plan(words: Words) -> None:
    """Validate a recipe and forecast sizes, FLOPs and memory from config.json alone."""
    from moe_compress.recipes.parser import parse, split_words

    sentence, overrides = split_words(words)
    require_model_name(parse(sentence, overrides).options.model)
    from moe_compress import api

    _show(api.plan(sentence, *overrides))


@app.command(cls=WithWords)
def export(
    words: Words, pad: Annotated[bool, typer.Option("--pad", help="accepted, and not needed", hidden=True)] = False
) -> None:
    """Make an uneven model plain, where that is exact: export FOLDER [out=DIR].

    export gguf-plan plan.json MODEL.gguf [out=...]: what a plan leaves of a GGUF file, byte for byte.

    export imatrix MODEL [out=FILE] [data=...]: weights of inputs for llama.cpp's quantization, expert by expert.
    """
    if words[0] in EXPORTS:
        typer.echo(f"written: {_exported(words[0], words[1:])}")
        return
    only(option_pairs(words[1:]), ("out",), "export")
    typer.echo(f"checkpoint: {_called('export', words[:1], words[1:])}")


def _exported(kind: str, words: list[str]) -> Any:
    """What was written of another kind than a checkpoint."""
    name, positional, models = EXPORTS[kind]
    given = words[: len(positional)]
    if len(given) < len(positional) or any("=" in word for word in given):
        raise ValueError(f"export {kind} takes {' and '.join(positional)}: export {kind} {' '.join(positional)}.")
    return _called(name, given, words[len(positional) :], models)


@app.command(cls=WithWords)
def analyze(words: ModelWords) -> None:
    """Say what each layer's experts do and which could go: analyze MODEL [layers=3,7] [prompts=FILE] [out=DIR]."""
    found = _called("analyze", words[:1], words[1:])
    _show(found)
    typer.echo(f"written: {', '.join(map(str, found.files))}", err=True)


@app.command(cls=WithWords)
def data(words: Words) -> None:
    """Show what a text becomes before it is cut: data show MODEL data=... [documents=3] [template=FILE]."""
    if len(words) < 2 or words[0] != "show" or "=" in words[1]:
        raise ValueError("data shows the text of a model: data show MODEL data=... [documents=3].")
    _show(_called(FUNCTIONS["data"], words[1:2], words[2:]))


@app.command(cls=WithWords)
def compare(words: Words) -> None:
    """Two models side by side, generations and predictions: compare A B [prompts=FILE] [max_tokens=30]."""
    if len(words) < 2 or "=" in words[1]:
        raise ValueError("compare takes two models: compare A B.")
    _show(_called("compare", words[:2], words[2:], models=2))


@app.command(cls=WithWords)
def push(
    words: Annotated[list[str], typer.Argument(metavar="FOLDER REPO [WORDS]")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be sent; needs no network")] = False,
) -> None:
    """Upload a checkpoint to the hub: push FOLDER USER/NAME [--dry-run] [private=true] [message=] [revision=]."""
    if len(words) < 2 or "=" in words[1]:
        raise ValueError("push takes a folder and a name on the hub: push FOLDER USER/NAME.")
    only(option_pairs(words[2:]), ("private", "message", "revision", "dry_run"), "push")
    _show(_called("push", words[:2], words[2:], dry_run=dry_run))


def _measure(harness: Harness, words: list[str], **flags: bool) -> None:
    given = harness.typed({**flags, **option_pairs(words[1:])})
    require_used(harness.name, harness.declaration.parameters, harness.options, given)
    require_model_name(words[0])
    found = harness.run(words[0], **given)
    _show(found)
    if found.exit_code:
        sys.exit(found.exit_code)


def _command_of(harness: Harness) -> Callable[..., None]:
    """The command of a harness; one that can check itself has a flag for that."""

    def command(words: ModelWords) -> None:
        _measure(harness, words)

    def checking_command(
        words: ModelWords, check: Annotated[bool, typer.Option("--check", help="the same as check=true")] = False
    ) -> None:
        _measure(harness, words, **({"check": True} if check else {}))

    return checking_command if "check" in harness.declaration.parameters else command


for _harness in HARNESSES.values():
    app.command(_harness.name, cls=WithWords, help=_harness.declaration.summary)(_command_of(_harness))


Records = Annotated[
    list[str] | None,
    typer.Argument(help="records, or folders of them (runs/records), and words", metavar="[RECORDS] [WORDS]"),
]


@app.command(cls=WithWords)
def table(words: Records = None) -> None:
    """Make tables from records (Markdown, CSV, LaTeX, JSON), one per protocol and model: table [RECORDS] [out=DIR]."""
    from moe_compress.cli.terminal import show_tables
    from moe_compress.reports.table import read_tables, write_tables
    from moe_compress.utils.files import require_writable

    places, options = _places(words, "table")
    out = Path(options.get("out", "runs"))
    require_writable(out, f"out={out}")
    tables, skipped = read_tables(places)
    written = write_tables(tables, out)
    show_tables(tables)
    typer.echo(f"written: {', '.join(map(str, written))}", err=True)
    for sentence in skipped:
        typer.echo(f"warning: skipped: {sentence}.", err=True)
    if skipped:
        raise typer.Exit(1)


@app.command(cls=WithWords)
def report(words: Records = None) -> None:
    """Make one HTML page of records: tables, fronts, pictures; and fronts as files: report [RECORDS] [out=] [png=]."""
    from moe_compress.reports.html_report import make_report

    places, options = _places(words, "report")
    png = coerce(bool, options.get("png", False), "png")
    # To start a thread for every core, as numpy does on import, costs more than all that is multiplied for a page.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    made = make_report(places, options.get("out", "runs"), report_columns(), png)
    typer.echo(f"written: {', '.join(map(str, made.files))}", err=True)
    if made.skipped:
        raise typer.Exit(1)


def _places(words: list[str] | None, command: str) -> tuple[list[str], Mapping[str, str]]:
    """Records, and the command's own words."""
    places = [word for word in words or () if "=" not in word]
    options = only(option_pairs([word for word in words or () if "=" in word]), TABLES[command], command)
    return places or ["runs/records"], options


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


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    # The system takes back all that is left at the end: to look for cycles in it first is a seventh of a short command.
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what was begun is ended as well
    launch = launched()
    if launch.rank:
        _run_beside(launch.rank)
        return
    try:
        app(args=normalised(sys.argv[1:]))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("MOE_COMPRESS_DEBUG") or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        typer.echo(f"error: {_sentence(error)}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED or (stop.code == TERMINATED and launch.count > 1):
            typer.echo("interrupted: the same command goes on from whatever was kept.", err=True)
        raise


def _run_beside(rank: int) -> None:
    """Run beside the first of several processes, which speaks for all: say but what ended this one alone."""
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            app(args=normalised(sys.argv[1:]))
    except Exception as error:
        if not isinstance(error, ValueError | ElsewhereError):
            typer.echo(f"error: process {rank}: {_sentence(error)}", err=True)
        sys.exit(2)


def _sentence(error: Exception) -> str:
    hint = " Use fewer or shorter windows, or device=cpu." if _out_of_memory(error) else ""
    if isinstance(error, FileNotFoundError):  # what is not there from the start is a ValueError
        hint = ": it was removed while it was used; run the same command again."
    return " ".join(printable(str(error)).split()) + hint


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError")
