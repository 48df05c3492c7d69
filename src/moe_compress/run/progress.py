"""Progress bars with time left; none when the output is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class Bar:
    """A bar that goes on when it is called with (done, of)."""

    def __init__(self, shown: Progress, what: str) -> None:
        self.shown = shown
        self.task = shown.add_task(what, total=None, said="")

    def __call__(self, done: int, total: int) -> None:
        """Move it."""
        self.shown.update(self.task, completed=done, total=total)

    def say(self, what: str, said: str) -> None:
        """What is being done, and numbers that belong to it, behind the bar."""
        self.shown.update(self.task, description=what, said=said)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Bar]:
    """A bar over layers, or steps. Quiet when standard error is not a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        yield Bar(bar, what)
