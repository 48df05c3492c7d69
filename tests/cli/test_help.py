"""Help, words and options as a newcomer meets them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_compress import api
from moe_compress.cli.arguments import normalised
from moe_compress.cli.catalogue import method_markdown
from moe_compress.cli.commands import app, main
from moe_compress.cli.help import options_of
from support.slow import slow_after

ROOT = Path(__file__).parents[2]
WORDLESS = ("list", "zoo")
COMMANDS = [name for each in app.registered_commands if (name := each.name or each.callback.__name__) not in WORDLESS]


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


@pytest.mark.parametrize("out", slow_after(1, [["out=X"], ["--out", "X"], ["--out=X"]]))
def test_export_and_table_take_out_either_way(out, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("F").mkdir()
    monkeypatch.setattr(api, "export", lambda folder, out="": f"{folder} {out}")
    assert "checkpoint: F X" in said(capsys, monkeypatch, "export", "F", "--pad", *out)
    assert "written: X/tables.md" in said(capsys, monkeypatch, "table", str(ROOT / "results" / "records"), *out)
    assert "export has no option 'data'" in said(capsys, monkeypatch, "export", "F", "--pad", "data=zoo")


@pytest.mark.parametrize("command", ["compress", "apply", "evaluate", "plan"])
def test_help_names_the_page_of_all_words(command, monkeypatch, capsys):
    assert "docs/recipes.md" in said(capsys, monkeypatch, command, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_default_stands_for(command):
    """None, nothing, 0 of windows and auto say nothing by themselves."""
    for line in "\n".join(options_of(command)).replace("\n" + " " * 27, " ").splitlines():
        key, _, rest = line.strip().partition("=")
        silent = rest.startswith(("none ", '"" ', "auto ")) or key in (
            "samples",
            "length",
            "eval_samples",
            "eval_length",
        )
        assert not line.startswith("  ") or not silent or ": " in rest, line
    assert "0: as many as the sources name" in "\n".join(options_of("compress"))


def test_list_says_it_too():
    assert "- `experts_at_once=0`: whole number; 0: all\n" in method_markdown("prune")


def test_list_shows_one_method(monkeypatch, capsys):
    shown = said(capsys, monkeypatch, "list", "expert_merge")
    assert "- `cap=none`: whole number; none: no limit\n" in shown and "by=outputs+logits" in shown
    assert "REAM (2604.04356)" in shown and "expert_drop" not in shown
    assert "did you mean 'top_k'" in said(capsys, monkeypatch, "list", "topk")
