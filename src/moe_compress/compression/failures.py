"""Runs that did not finish leave a record of that, which tables show as a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moe_compress.recipes.recipe import Recipe
from moe_compress.reports.record import Failure, now
from moe_compress.reports.table import sentence_of
from moe_compress.run.context import Run
from moe_compress.run.launch import ElsewhereError


@contextlib.contextmanager
def record_failure(recipe: Recipe, name: str, run: Run) -> Iterator[None]:
    """Keep the reason under results/failures/NAME.json if what is inside ends in an error, and pass that on.

    A run that was interrupted, or lost another process, has not failed: it goes on where it stopped.
    """
    try:
        yield
    except ElsewhereError:
        raise
    except Exception as error:
        sentence = sentence_of(
            [{"method": stage.method, "given": stage.explicit_parameters} for stage in recipe.stages]
        )
        reason = " ".join(str(error).split()) or type(error).__name__
        model = Path(recipe.options.model).name
        Failure(name=name, model=model, recipe=sentence, reason=reason, written=now()).save(run.results("failures"))
        raise
