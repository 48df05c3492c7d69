"""Help, words and options as a newcomer meets them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from moe_compress import api
from moe_compress.cli import catalogue
from moe_compress.cli.arguments import normalised
from moe_compress.cli.commands import main
from moe_compress.methods import registry
from moe_compress.run.options import Options

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
# Their sections are still to be written.
UNWRITTEN: set[str] = set()


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the command line prints."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_dashes_are_as_good_as_words():
    given = ["export", "F", "--pad", "--out", "X", "--max-tokens=3", "--keep", "6", "--help"]
    assert normalised(given) == ["export", "F", "--pad", "out=X", "max_tokens=3", "keep=6", "--help"]
    with pytest.raises(ValueError, match="--samples needs a value: samples=VALUE"):
        normalised(["plan", "expert_drop", "--samples"])


@pytest.mark.parametrize("out", [["out=X"], ["--out", "X"], ["--out=X"]])
def test_export_and_table_take_out_either_way(out, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "export", lambda folder, out="": f"{folder} {out}")
    assert "checkpoint: F X" in said(capsys, monkeypatch, "export", "F", "--pad", *out)
    assert "written: X/tables.md" in said(capsys, monkeypatch, "table", str(ROOT / "results" / "records"), *out)
    assert "export has no option 'data'" in said(capsys, monkeypatch, "export", "F", "--pad", "data=zoo")


@pytest.mark.parametrize("command", ["compress", "apply", "evaluate", "plan"])
def test_help_names_the_page_of_all_words(command, monkeypatch, capsys):
    assert "docs/recipes.md" in said(capsys, monkeypatch, command, "--help")


def test_list_shows_one_method(monkeypatch, capsys):
    shown = said(capsys, monkeypatch, "list", "expert_merge")
    assert "- `cap=none`: whole number or none\n" in shown and "by=outputs+logits" in shown
    assert "REAM (2604.04356)" in shown and "expert_drop" not in shown
    assert "did you mean 'top_k'" in said(capsys, monkeypatch, "list", "topk")


def test_every_option_and_parameter_is_documented_with_its_default():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", page, re.M | re.S))
    options = page.partition("## Options of a run")[2].partition("## Methods")[0]
    for name, field in Options.model_fields.items():
        assert f"| `{name}` | `{catalogue.word(field.default)}` | {catalogue.choices(field.annotation)} |" in options
    assert set(sections) == set(registry.METHODS) - UNWRITTEN
    for name, section in sections.items():
        method = registry.METHODS[name]
        for key, parameter in method.parameters.items():
            expected = f"| `{key}` | `{catalogue.word(parameter.default)}` | {catalogue.choices(parameter.hint)} |"
            assert expected in section, f"{name}: {expected}"
        for preset, values in method.presets.items():
            assert f"| `preset={preset}` | `{catalogue.recipe_words(values)}` |" in section
        assert len(re.findall(r"^\| `\w+` \| `", section, re.M)) >= len(method.parameters)
    assert "docs/recipes.md" in (ROOT / "README.md").read_text(encoding="utf-8")
