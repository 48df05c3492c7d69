"""What a person sees: log lines, Markdown, tables. Nothing is rendered, nor the means to do so imported, in a pipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_compress.utils.text import printable

if TYPE_CHECKING:
    from moe_compress.reports.table import Table


def set_up_logging(verbose: bool) -> None:
    """Log to standard error; only the command line calls this."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from moe_compress.cli.rendering import log_handler

        handler = log_handler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_without_controls)
    logger = logging.getLogger("moe_compress")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    # The hub's client reports every attempt; what came of them is said in one sentence.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def _without_controls(record: logging.LogRecord) -> bool:
    """Names in a message may hold what a terminal would obey."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def show_markdown(text: str) -> None:
    """Print Markdown to standard output: rendered on a terminal, as it is in a pipe."""
    text = printable(text)
    if sys.stdout.isatty():
        from moe_compress.cli import rendering

        rendering.markdown(text)
    else:
        sys.stdout.write(text.rstrip() + "\n")


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables: Markdown in a pipe; on a terminal too narrow for a few rows, those as columns."""
    for found in tables:
        if sys.stdout.isatty():
            from moe_compress.cli import rendering

            rendering.table(found)
        else:
            sys.stdout.write(found.markdown() + "\n")


def show_run(tables: Sequence[Table]) -> None:
    """Print the row or two of a single run as columns: a number a line."""
    for found in tables:
        if sys.stdout.isatty():
            from moe_compress.cli import rendering

            rendering.turned(found)
        else:
            sys.stdout.write(found.markdown(turned=True) + "\n")


def show_result(result: Any) -> None:
    """Print what a command made: the rows of checkpoint and original, and where the checkpoint is."""
    from moe_compress.reports.table import make_tables

    rows = {record.name: record for record in (result.original, result.record) if record is not None}
    if rows:
        show_run(make_tables(rows.values()))
    sys.stdout.write(f"checkpoint: {result.folder}\n")
