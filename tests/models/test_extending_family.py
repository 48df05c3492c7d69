"""docs/extending/family.md: its example runs, and its table names every field of `Family`."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_compress.models import families

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "family.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def example() -> Iterator[dict[str, Any]]:
    """The names that the page's code defines; its entry is taken out again."""
    before = dict(families.FAMILIES)
    found: dict[str, Any] = {"__name__": "extending_family"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), found)
    yield found
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def test_the_example_is_compressed_end_to_end(example, tmp_path):
    example["test_a_tulip_is_compressed"](tmp_path)


def test_without_its_entry_the_example_is_not_understood(example):
    del families.FAMILIES["tulip"]
    with pytest.raises(ValueError, match="not a Mixture-of-Experts architecture that is known here"):
        families.family_of(example["TulipConfig"]())


def test_the_table_names_every_field_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(families.Family)}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        if isinstance(default, str | bool | int | None):
            assert rows[name] == "`{}`".format(f'"{default}"' if isinstance(default, str) else default), name
        elif default == ():
            assert rows[name] == "none"


def test_families_are_listed_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import importlib.util as u;"
        f"s = u.spec_from_file_location('families', {families.__file__!r}); m = u.module_from_spec(s);"
        "sys.modules['families'] = m; s.loader.exec_module(m); print(len(m.FAMILIES))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(families.FAMILIES)
