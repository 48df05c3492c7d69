"""Markdown, tables and log lines as a terminal shows them."""

from __future__ import annotations

import logging

import rich.box
import rich.table
from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown
from rich.text import Text

from moe_compress.reports.table import Table
from moe_compress.run.progress import console

ROWS_AS_COLUMNS = 3


def log_handler() -> logging.Handler:
    """Log lines above a progress bar."""
    return RichHandler(console=console, show_path=False, show_time=False, markup=False)


def markdown(text: str) -> None:
    """Print Markdown, rendered."""
    Console().print(Markdown(text))


def table(found: Table) -> None:
    """Print a table; where the terminal is too narrow for a few rows, those as columns."""
    out, text = Console(), found.markdown()
    wide = max(map(len, text.splitlines())) > out.width
    if not wide:
        out.print(Markdown(text))
    elif len(found.rows) > ROWS_AS_COLUMNS:
        print(text)
    else:
        turned(found)


def turned(found: Table) -> None:
    """Print the row or two of a table as columns: a number a line."""
    heading, how = found.markdown().split("\n\n")[:2]
    shown, cells = rich.table.Table(box=rich.box.SIMPLE_HEAD), found.turned
    for title in cells.titles:
        shown.add_column(Text(title), overflow="fold")
    for row in cells.rows:
        shown.add_row(*map(Text, row))
    Console().print(Markdown(heading), Markdown(how), shown)
