"""What a person sees: progress bars with time left (none when the output is no terminal), logging, tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import rich.table
from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown
from rich.text import Text

from moe_compress.reports.table import Table, make_tables
from moe_compress.run.progress import console

ROWS_AS_COLUMNS = 3


def set_up_logging(verbose: bool) -> None:
    """Log to standard error; only the command line calls this."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("moe_compress")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    # The hub's client reports every attempt; what came of them is said in one sentence.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def show_markdown(text: str) -> None:
    """Print Markdown to standard output: rendered on a terminal, as it is in a pipe."""
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        sys.stdout.write(text.rstrip() + "\n")


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables: Markdown in a pipe; on a terminal too narrow for a few rows, those as columns."""
    out = Console()
    for found in tables:
        text = found.markdown()
        wide = max(map(len, text.splitlines())) > out.width
        if not sys.stdout.isatty() or (wide and len(found.frame) > ROWS_AS_COLUMNS):
            sys.stdout.write(text + "\n")
        elif not wide:
            out.print(Markdown(text))
        else:
            heading, how = text.split("\n\n")[:2]
            out.print(Markdown(heading), Markdown(how), _turned(found))


def show_run(tables: Sequence[Table]) -> None:
    """Print the row or two of a single run as columns: a number a line."""
    for found in tables:
        if sys.stdout.isatty():
            heading, how = found.markdown().split("\n\n")[:2]
            Console().print(Markdown(heading), Markdown(how), _turned(found))
        else:
            sys.stdout.write(found.markdown(turned=True) + "\n")


def show_result(result: Any) -> None:
    """Print what a command made: the rows of checkpoint and original, and where the checkpoint is."""
    rows = {record.name: record for record in (result.original, result.record) if record is not None}
    if rows:
        show_run(make_tables(rows.values()))
    sys.stdout.write(f"checkpoint: {result.folder}\n")


def _turned(found: Table) -> rich.table.Table:
    turned, frame = rich.table.Table(box=rich.box.SIMPLE_HEAD), found.turned
    for title in ("", *frame.columns):
        turned.add_column(Text(title), overflow="fold")
    for name, cells in zip(frame.index, frame.to_numpy(), strict=True):
        turned.add_row(Text(name), *(Text(cell) for cell in cells))
    return turned
