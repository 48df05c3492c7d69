"""Checkpoints of every kind of edit, each written once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from moe_compress.checkpoints.reader import Checkpoint
from support.edit_kinds import edits_of
from support.editing import write


@pytest.fixture(scope="session")
def written(sources, tmp_path_factory) -> Callable[[str, str], Checkpoint]:
    """(family, kind of edits) -> the checkpoint."""
    folder = tmp_path_factory.mktemp("trimmed")

    @functools.cache
    def make_written(family: str, kind: str) -> Checkpoint:
        return write(sources(family), edits_of(kind, sources(family)), folder / f"{family} {kind}")

    return make_written
