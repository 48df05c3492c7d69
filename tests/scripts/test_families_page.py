"""docs/families.md says of every tested family what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import families
from moe_compress.methods import registry
from moe_compress.models.families import FAMILIES
from support import tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]
TITLES, TABLE = ROWS[0], {row[0]: row[1:] for row in ROWS[1:]}


def test_the_page_is_about_the_families_that_are_tested():
    assert sorted(TABLE) == sorted(tiny.CONFIGS) == sorted(f.model_type for f in FAMILIES.values() if f.tested)


def test_every_method_and_program_has_its_column():
    alone = {name for name, method in registry.METHODS.items() if method.scope in ("model", "weight")}
    assert {title.split()[0] for title in TITLES[1:-2]} == alone
    for name, cells in TABLE.items():
        family = FAMILIES[name]
        assert cells[-2:] == ["yes" if known else "no" for known in (family.vllm, family.llama_cpp)]
        refused = [cell.startswith("no") for cell in cells[:-2]]
        assert all(refused) == (name in tiny.NO_EXPERT_EDITS) == bool(family.no_expert_edits), name


@pytest.mark.parametrize("family", ["phimoe", "llama4_text", "jetmoe"])
def test_rows_are_what_the_checks_say(family):
    found = [word for word, _ in families.verdicts(FAMILIES[family]).values()]
    assert [re.sub(r" \(\d+\)", "", cell) for cell in TABLE[family][:-2]] == found


@pytest.mark.slow
def test_the_page_is_current(tmp_path):
    """In a process of its own: what other tests register is no architecture of transformers."""
    made = tmp_path / "families.md"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "docs" / "families.py"), str(made)], check=True)
    assert made.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
