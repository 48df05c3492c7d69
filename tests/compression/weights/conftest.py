"""Models as others publish them, beside dense copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from support import published


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable[[str, str], tuple[Path, Path]]:
    """(family, format) -> a tiny model in it, and a copy of its numbers in fp32."""
    place = tmp_path_factory.mktemp("pairs")
    return functools.cache(lambda family, format: published.publish_both(family, format, place))
